"""`hiso watch RUN`: the figures of a run in a terminal, as they come, until it ends."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hiso_jax._engine import checks
from hiso_jax.train import report
from hiso_jax.train.methods import title
from hiso_jax.train.progress import duration
from hiso_jax.train.rows import Row, read

EVERY = 0.5
"""Seconds between looks."""
SILENT = 5.0
"""Seconds without a round after which it is asked whether the run is still there."""
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Characters of a curve."""


@dataclasses.dataclass
class Part:
    """One method of a run: its rows as they are now."""

    folder: Path
    rows: list[Row] = dataclasses.field(default_factory=list)
    seen: Any = None

    def look(self) -> bool:
        """Read what is new; return whether there is something."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.folder / "metrics.jsonl")
            seen = found.st_ino, found.st_size, found.st_mtime_ns
            if seen != self.seen:
                self.rows, self.seen = read(self.folder / "metrics.jsonl"), seen
                return True
        return False

    @property
    def summary(self) -> dict[str, Any] | None:
        """How it ended; none of a run that is under way, or was killed."""
        path = self.folder / "summary.json"
        try:  # a run that is gone on with has one that is older than its rows
            if path.stat().st_mtime_ns < (self.folder / "metrics.jsonl").stat().st_mtime_ns:
                return None
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None


def curve(values: Sequence[float | None], width: int = WIDTH) -> str:
    """Numbers as a row of bars, each the mean of as many; what is none of a number is a gap.

    Example:
      >>> curve([0.0, 1.0, None, 2.0, 3.5]), curve([1.0, 1.0]), curve(range(8), 4)
      ('▁▃ ▅█', '▁▁', '▁▃▆█')
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    if len(numbers) > width:
        parts = np.array_split(np.array(numbers), width)
        numbers = [float(np.mean(part)) for part in parts]
    finite = [x for x in numbers if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    height = lambda x: round((x - low) / (high - low or 1.0) * (len(BARS) - 1))  # noqa: E731
    return "".join(BARS[height(x)] if math.isfinite(x) else " " for x in numbers)


def parts_of(folder: Path) -> tuple[dict[str, Any], dict[str, Part]]:
    """The options of a run, and its methods by name.

    Raises:
      ValueError: there is none in the folder.
    """
    try:
        saved = json.loads((folder / "options.json").read_text())
        methods = list(saved["learning_rates"])
        options = saved["options"] | {"job": saved["job"]}
    except (OSError, ValueError, LookupError, TypeError):
        what = "is no run" if folder.exists() else "is not there"
        raise ValueError(f"RUN: {folder} {what}; expected the folder of a job, which has "
                         "options.json") from None  # fmt: skip
    if saved["job"] == "nvflare":
        raise ValueError(f"RUN: {folder} is of a job of hiso nvflare: its rounds are in the "
                         "server's rounds.jsonl; hiso predict labels rows")  # fmt: skip
    return options, {m: Part(folder / m if len(methods) > 1 else folder) for m in methods}


def alive(folder: Path) -> bool:
    """Whether a process holds the run; where nobody can hold a file, it is taken to."""
    try:
        handle = os.open(folder / ".lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def metric_of(rows: Sequence[Row]) -> str:
    """The metric of a run's rows."""
    names = [name for name in rows[0] if name.startswith("dev_") and name != "dev_loss"]
    return names[0].removeprefix("dev_")


def line(part: Part, options: dict[str, Any]) -> str:
    """How far a method is, in one line."""
    taken = [row for row in part.rows if "seconds" in row]
    if not part.rows:
        return "no round yet"
    metric, looks = metric_of(part.rows), [row for row in part.rows if "dev_loss" in row]
    dev = report.figure(metric, looks[-1][f"dev_{metric}"])
    if not taken:
        return f"round 0/{options['rounds']}  dev {dev}  compiling"
    last = taken[-1]
    each = float(np.median([row["seconds"] for row in taken[-20:]]))
    left = options["rounds"] - last["round"]
    about = f"  about {duration(each * left)} left" * (left > 0 and part.summary is None)
    return (f"round {last['round']}/{options['rounds']}  {report.loss_of(last['loss'])}  "
            f"dev {dev}  "
            f"{duration(each)} per round  up {report.size(last['uplink_bytes'])}  "
            f"down {report.size(last['downlink_bytes'])}{about}")  # fmt: skip


def view(parts: dict[str, Part], options: dict[str, Any]) -> Group:
    """The figures of all methods, and their curves."""
    shown: list[Any] = []
    for name, part in parts.items():
        shown.append(Text.assemble((f"{title(name)}  ", "bold"), line(part, options)))
        looks = [row for row in part.rows if "dev_loss" in row]
        if len(looks) > 1:
            metric, out = metric_of(part.rows), Table.grid(padding=(0, 2))
            for key in ("dev_loss", f"dev_{metric}"):
                values = [row[key] for row in looks]
                show = (lambda v: "" if v is None else f"{v:.3f}") if key == "dev_loss" else (
                    lambda v, metric=metric: report.figure(metric, v))  # fmt: skip
                out.add_row(key.replace("_", " "), show(values[0]), curve(values), show(values[-1]))
            shown.append(out)
    return Group(*shown)


def follow(
    folder: Path, parts: Sequence[Part], every: float = EVERY, silent: float = SILENT
) -> Iterator[None]:
    """Yield whenever there is something new to show, until the run ends."""
    last = time.monotonic()
    while True:
        ended = all(part.summary is not None for part in parts)
        if any([part.look() for part in parts]):
            last = time.monotonic()
            yield
        if ended:
            return
        if time.monotonic() - last > silent:
            if not alive(folder):
                return
            last = time.monotonic()
        time.sleep(every)


def watch(folder: Path, every: float = EVERY, silent: float = SILENT) -> None:
    """Show a run until it ends, and say how it did.

    Args:
      folder: of the run.
      every: seconds between looks.
      silent: seconds without a round after which it is asked whether the run is still there.

    Raises:
      ValueError: there is none in the folder.
    """
    checks.number("--every", every, 0, above=True)
    options, parts = parts_of(folder)
    live = Live(console=report.console, auto_refresh=False) if report.console.is_terminal else None
    said: dict[str, int] = {}
    with live or contextlib.nullcontext():
        for _ in follow(folder, list(parts.values()), every, silent):
            if live is not None:
                live.update(view(parts, options), refresh=True)
                continue
            for name, part in parts.items():  # a line a look at the dev split
                looks = [row["round"] for row in part.rows if "dev_loss" in row]
                if looks and said.get(name) != looks[-1]:
                    said[name] = looks[-1]
                    report.say(f"{title(name)}  {line(part, options)}")
    for name, part in parts.items():
        _say_end(part, name, folder, options)


def _say_end(part: Part, name: str, folder: Path, options: dict[str, Any]) -> None:
    """One line on how a method ended."""
    if (summary := part.summary) is None:
        job = options["job"]
        report.say(f"{title(name)} has not ended, and no process works on it. To go on with it: "
                   f"hiso {job} {report.resuming(folder)}", style="yellow")  # fmt: skip
        return
    metric = summary["metric"]
    before, after = (report.figure(metric, summary[k]) for k in (f"{metric}_before", metric))
    report.say(f"{title(name)}: {summary['rounds']} rounds, test {metric} {before} before, "
               f"{after} after; ", str(part.folder / "report.html"))  # fmt: skip
    if reason := summary.get("stopped"):
        report.fail(reason)


def main(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    every: float = EVERY,
) -> None:
    """Show the figures of a run in this terminal, as they come, until it ends.

    Args:
      run: the folder of a job.
      every: seconds between looks.
    """
    with report.door(), contextlib.suppress(KeyboardInterrupt):
        watch(run, every)


def cli() -> None:
    """Parse the command line and watch."""
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
