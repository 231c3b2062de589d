"""Files of rows, one JSON object a line: read, added to, and asked what they lack."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hiso_jax.train import report

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


@contextlib.contextmanager
def append(path: Path) -> Iterator[Callable[[Row], None]]:
    """Give a function that adds a row, which is in the file when it returns.

    A last line that was cut off is ended; a file that got no row is not left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if path.stat().st_size and not _ended(path):
            file.write("\n")

        def add(row: Row) -> None:
            file.write(report.dumps(row) + "\n")
            file.flush()

        try:
            yield add
        finally:
            file.flush()
            if not path.stat().st_size:
                path.unlink()


def _ended(path: Path) -> bool:
    """Whether the last line of a file is whole; nothing before it is read."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def key(row: Row, names: Iterable[str]) -> str:
    """What a row has under these names, as text that can be looked up.

    Example:
      >>> key({"seed": 1, "rate": 0.5, "loss": 2.0}, ("rate", "seed"))
      '[0.5, 1]'
    """
    return json.dumps([row.get(name) for name in names])


def missing(wanted: list[Row], rows: list[Row]) -> list[Row]:
    """Those wanted of which there is no row yet; all of them have the same names.

    Example:
      >>> missing([{"seed": 0}, {"seed": 1}], [{"seed": 1, "loss": 2.0}])
      [{'seed': 0}]
    """
    done = {key(row, wanted[0]) for row in rows} if wanted else set()
    return [row for row in wanted if key(row, wanted[0]) not in done]


def of(wanted: list[Row], rows: list[Row]) -> list[Row]:
    """The rows of those wanted."""
    asked = {key(row, wanted[0]) for row in wanted}
    return [row for row in rows if wanted and key(row, wanted[0]) in asked]
