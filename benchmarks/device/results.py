"""What was found, a line a case: readable after a crash, appended to by several processes."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "results.jsonl"


class Skip(Exception):
    """There is nothing to measure here, and why."""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by the name of their case; of several the last one counts."""
    path = folder / FILE
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows[row["case"]] = row
        except (ValueError, LookupError, TypeError):
            continue  # the process was killed while it wrote
    return rows


def append(folder: Path, case: str, part: str, **found: Any) -> None:
    """Write a row and see it on the disk, on a line of its own whatever is there."""
    row = {"case": case, "part": part, "when": time.strftime("%Y-%m-%d %H:%M:%S")} | found
    path = folder / FILE
    before = path.read_bytes() if path.exists() else b""
    torn = before and not before.endswith(b"\n")  # a process was killed while it wrote
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(plain(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def plain(value: Any) -> Any:
    """Plain data that JSON has words for: no NaN, no types of NumPy's."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def good(rows: Mapping[str, Mapping[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """What was found in a part, by case, where something was."""
    own = {name: row for name, row in rows.items() if row["part"] == part}
    return {name: row["found"] for name, row in own.items() if row.get("ok")}


def rates(rows: Mapping[str, Mapping[str, Any]], default: Mapping[str, float]) -> dict[str, float]:
    """TFLOP/s of matrix products by dtype, as far as they have been measured."""
    found = good(rows, "machine").get("machine", {}).get("matmul_tflops", {})
    return dict(default) | {k: max(v, 1e-6) for k, v in found.items()}


def forget(folder: Path, names: set[str]) -> None:
    """Take the rows of some cases out, so that they are measured again."""
    kept = [json.dumps(row) for name, row in read(folder).items() if name not in names]
    path = folder / FILE
    if path.exists():
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, path)
