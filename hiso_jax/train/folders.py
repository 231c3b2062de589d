"""What runs leave: a folder with one holder, its rows, and Ctrl-C, which loses nothing."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hiso_jax._engine import locks
from hiso_jax.train import report
from hiso_jax.train.methods import sends_models
from hiso_jax.train.rows import Row, read


@contextlib.contextmanager
def stop_on_ctrl_c() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets: the round under way is finished, not lost."""
    stop = threading.Event()

    def ask(number: int, frame: Any) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt  # the second time, at once
        stop.set()
        report.say("Stopping after this round; keeping what was done.", style="yellow")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def rows(folder: Path, done: int) -> list[Row]:
    """The rows of metrics.jsonl of the rounds that are done."""
    # A row is written before its record: the last may be broken, or of a lost round.
    return [row for row in read(folder / "metrics.jsonl") if row["round"] <= done]


@contextlib.contextmanager
def alone(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold a folder, so that no other process resumes or moves a run that is under way.

    On a file system without locks nobody can hold it; that is said, and it goes on.

    Args:
      folder: made if absent.
      patience: seconds to wait for a process that holds it.

    Raises:
      BlockingIOError: another process holds it.
      OSError: the folder cannot be written to.
    """
    end = time.monotonic() + patience
    with contextlib.ExitStack() as stack:
        while True:
            try:
                why = stack.enter_context(locks.held(folder / ".lock", wait=False))
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    text = f"{folder}: another process is running there"
                    raise BlockingIOError(text) from None
            time.sleep(0.1)
        if why:
            report.say(f"Note: the file system of {folder} has no locks ({why}); see to it that no "
                       "other process works there", style="yellow")  # fmt: skip
        yield


def find(folder: Path, name: str) -> Path | None:
    """A file of a run; where several methods are in one folder, what they share is above."""
    places = (folder / name, folder.parent / name)
    return next((path for path in places if path.is_file()), None)


def make_room(out: Path) -> None:
    """Move a run that is in the folder aside."""
    if any((out / name).exists() for name in ("options.json", "metrics.jsonl", "ledger.sqlite")):
        number = next(i for i in range(1, 10**6) if not out.with_name(f"{out.name}.{i}").exists())
        aside = out.with_name(f"{out.name}.{number}")
        with alone(out):
            out.rename(aside)
        report.say("The run that was in ", f"{out}/", " is now in ", f"{aside}/")


def say_where(out: Path, methods: Sequence[str], several: bool) -> None:
    """Print which files methods have left; of `several` each has a folder of its own."""
    for method in methods:
        ledgers = "" if sends_models(method) else "ledger.sqlite, ledger.safetensors, "
        report.say(
            "Written to ", f"{out / method if several else out}/", ": report.html, curve.png, "
            f"{'' if several else 'split.png, '}metrics.jsonl, summary.json, {ledgers}and the model"
        )  # fmt: skip
    if several:
        report.say("Of all of them, in ", f"{out}/", ": curve.png, split.png, summary.json")
