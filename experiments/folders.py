"""What runs leave: files of rows, a folder with one holder, and Ctrl-C, which loses nothing."""

import contextlib
import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from experiments.report import console

Row = dict[str, Any]


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets: the round under way is finished, not lost."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt  # the second time, at once
        stop.set()
        console.print("[yellow]Stopping after this round; keeping what was done.")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    except FloatingPointError as error:
        console.print(error, style="red", markup=False)
    finally:
        signal.signal(signal.SIGINT, before)


def read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path) -> TextIO:
    """Open a file of rows to add some; a last line that was cut off is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        file.write("\n")
    return file


def rows(folder: Path, done: int) -> list[Row]:
    """The rows of metrics.jsonl of the rounds that are done."""
    # A row is written before its record: the last may be broken, or of a lost round.
    return [row for row in read(folder / "metrics.jsonl") if row["round"] <= done]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other process resumes or moves a run that is under way.

    Raises:
      BlockingIOError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BlockingIOError(f"{folder}: another process is running there") from None
    finally:
        os.close(handle)


def make_room(out: Path) -> None:
    """Move a run that is in the folder aside."""
    if any((out / name).exists() for name in ("options.json", "metrics.jsonl", "ledger.sqlite")):
        number = next(i for i in range(1, 10**6) if not out.with_name(f"{out.name}.{i}").exists())
        aside = out.with_name(f"{out.name}.{number}")
        with alone(out):
            out.rename(aside)
        console.print(f"The run that was in [bold]{out}/[/bold] is now in [bold]{aside}/[/bold]")
