"""Long work that shows how far it is: bars in a terminal, a line every few seconds elsewhere."""

import threading
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

EVERY = 10.0
"""Seconds between lines."""
WIDE = 80
"""Columns of a terminal that has room for a bar and the time that is left, beside the figures."""


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
      >>> [duration(s) for s in (0.34, 4.2, 80, 4000)]
      ['0.34 s', '4.2 s', '1 min 20 s', '1 h 6 min']
    """
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest} s" if rest and minutes < 10 else "")
    return f"{minutes // 60} h {minutes % 60} min"


class Lines:
    """What a `rich.progress.Progress` does, for output that is a file: lines instead of bars.

    Args:
      console: to print on.
      every: seconds between two lines of a task.
    """

    def __init__(self, console: Console, every: float = EVERY):
        self.console, self.every = console, every
        self._tasks: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def add_task(
        self,
        description: str,
        total: float | None = None,
        completed: float = 0,
        visible: bool = True,
        status: str = "",
    ) -> int:
        """Begin a task; its status, if it has one, is said at once."""
        number, now = len(self._tasks), time.monotonic()
        self._tasks[number] = dict(
            description=description, total=total, completed=completed, status=status,
            began=now, first=completed, said=now, last=None,
        )  # fmt: skip
        if visible and status:
            self.console.print(f"{description}: {status}", soft_wrap=True, markup=False)
        return number

    def update(
        self,
        number: int,
        *,
        completed: float | None = None,
        advance: float = 0,
        total: float | None = None,
        status: str | None = None,
        visible: bool = True,
    ) -> None:
        """Take note of what was done; say it if the last line was long ago, or if it is all."""
        del visible
        with self._lock:
            task = self._tasks[number]
            task["completed"] = task["completed"] + advance if completed is None else completed
            task["total"] = task["total"] if total is None else total
            task["status"] = task["status"] if status is None else status
            now, all_done = time.monotonic(), task["completed"] == task["total"]
            if now - task["said"] >= self.every or (all_done and now - task["began"] > self.every):
                if task["last"] != task["completed"]:
                    task["said"], task["last"] = now, task["completed"]
                    self.console.print(self._line(task, now), soft_wrap=True, markup=False)

    def advance(self, number: int, advance: float = 1) -> None:
        """Take note of a step."""
        self.update(number, advance=advance)

    def remove_task(self, number: int) -> None:
        """Forget a task."""
        self._tasks.pop(number)

    def _line(self, task: dict[str, Any], now: float) -> str:
        done, total = task["completed"], task["total"]
        parts = [f"{task['description']} {done:,.0f}"]
        if total:
            parts = [f"{parts[0]}/{total:,.0f}"]
            if task["first"] < done < total:
                pace = (now - task["began"]) / (done - task["first"])
                parts.append(f"about {duration(pace * (total - done))} left")
        return "  ".join([*parts, task["status"]] if task["status"] else parts)


def progress(console: Console, count: str = "{task.completed}/{task.total}") -> Progress | Lines:
    """A bar that keeps a line of figures beside it; lines where there is no terminal."""
    if not console.is_terminal:
        return Lines(console)
    wide = console.width >= WIDE
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        *([BarColumn(bar_width=20)] if wide else []),
        TextColumn(count),
        # What does not fit is continued on the next line.
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(overflow="fold")),
        *([TimeRemainingColumn()] if wide else []),
        console=console,
    )
