"""Runs cases in processes of their own, each case under a time limit, and writes down what ends.

A compilation that hangs, a device that runs out of memory, a process that is killed: each costs
its own case and nothing else.
"""

import itertools
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from benchmarks.device import cases, results
from benchmarks.device.cases import Case

LONGEST_START = 180.0
"""Seconds after which a process that has not begun its first case is given up."""
BEGIN, END = "@begin ", "@end "
"""What a worker says on a line of its own, followed by the name of the case."""


class NoDevice(RuntimeError):
    """Processes do not even start."""


class Settings(NamedTuple):
    """How cases are run.

    Attributes:
      folder: where rows, and what the processes say on stderr, are written.
      command: names of cases -> the command that runs them, one after another.
      deadline: of `time.monotonic`.
      limit: seconds of a case; by default three times what it should take, 90 at least.
      keep_programs: whether compiled programs may come from JAX's cache on disk, so that the
        seconds of compilation mean nothing.
    """

    folder: Path
    command: Callable[[Sequence[str]], list[str]]
    deadline: float = math.inf
    limit: float | None = None
    keep_programs: bool = False


def say(text: str) -> None:
    """Print a line at once: whoever watches a pipe sees it too."""
    print(text, flush=True)


def limit_of(case: Case, settings: Settings, rates: dict[str, float]) -> float:
    """Seconds after which a case is stopped."""
    return max(90.0, 3 * case.seconds(rates)) if settings.limit is None else settings.limit


def run(every: Sequence[Case], settings: Settings) -> list[Case]:
    """Run the cases that have no row yet; return those that are left for another time.

    Raises:
      NoDevice: a process ends, or hangs, before its first case.
    """
    known = None
    while True:
        rows = results.read(settings.folder)
        todo = [case for case in every if case.name not in rows]
        rates = results.rates(rows, cases.RATES)
        planned = cases.plan(todo, settings.deadline - time.monotonic(), rates)
        if planned.chosen and rates != known:  # at first, and with the machine's own rates
            show(planned, len(every) - len(todo), rates)
        known = rates
        if not planned.chosen:
            return planned.left
        first = planned.chosen[0].part
        same = [case.part == first for case in planned.chosen]
        batch = planned.chosen[: same.index(False) if False in same else None]
        _work(batch, settings, rates)
        if results.read(settings.folder).keys() == rows.keys():
            return [case for case in todo if case.name not in rows]  # the time was over


def show(planned: cases.Plan, done: int, rates: dict[str, float]) -> None:
    """Print the plan, a line a part."""
    shown = ", ".join(f"{k} {v:.3g}" for k, v in rates.items())
    say(f"Plan: {len(planned.chosen)} cases in about {planned.seconds / 60:.1f} minutes, "
        f"{done} done before, {len(planned.left)} left for another time (TFLOP/s of matrix "
        f"products that are reckoned with: {shown})")  # fmt: skip
    for part, group in itertools.groupby(planned.chosen, key=lambda case: case.part):
        own = list(group)
        seconds = sum(case.seconds(rates) for case in own)
        names = "; ".join(
            f"{case.name.removeprefix(f'{part}/')} ({case.seconds(rates):.0f} s)" for case in own
        )
        say(f"  {part}: " + (names if len(own) < 9 else f"{len(own)} cases ({seconds:.0f} s)"))
    if planned.left:
        say(f"  left: {listed(planned.left)}")


def listed(some: Sequence[Case]) -> str:
    """Cases by name, or how many there are of each part."""
    if len(some) < 9:
        return "; ".join(case.name for case in some)
    counts = Counter(case.part for case in some)
    return ", ".join(f"{count} of {part}" for part, count in counts.items())


def _work(batch: Sequence[Case], settings: Settings, rates: dict[str, float]) -> None:
    """Run cases in one process; write a row for a case that is stopped or kills it."""
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    if not settings.keep_programs:
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    by_name = {case.name: case for case in batch}
    with (settings.folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            settings.command(list(by_name)), stdout=subprocess.PIPE, stderr=log, text=True,
            env=environment, start_new_session=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        try:
            _follow(process, lines, by_name, settings, rates)
        finally:
            _kill(process)


def _pump(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _follow(
    process: "subprocess.Popen[str]",
    lines: "queue.Queue[str | None]",
    by_name: dict[str, Case],
    settings: Settings,
    rates: dict[str, float],
) -> None:
    """Read what a worker says until it ends, or a time is over."""
    current: Case | None = None
    began, any_case = time.monotonic(), False
    until = began + LONGEST_START

    def fail(case: Case, reason: str) -> None:
        seconds = time.monotonic() - began
        results.append(settings.folder, case.name, case.part, ok=False, reason=reason,
                       seconds=seconds)  # fmt: skip
        say(f"  {case.name}: {reason}")

    while True:
        try:
            now = time.monotonic()
            line = lines.get(timeout=max(min(until, settings.deadline) - now, 0))
        except queue.Empty:
            if settings.deadline <= time.monotonic():
                say("  the minutes are over" + (f", in the middle of {current.name}" if current
                                                else ""))  # fmt: skip
                return
            if current is None:
                raise NoDevice(
                    f"no case was begun within {LONGEST_START:.0f} s; {_last(settings.folder)}"
                ) from None
            fail(current, f"stopped at its limit of {until - began:.0f} s")
            return
        if line is None:
            code: Any = process.wait()
            if current is not None:
                fail(current, f"the process ended with {code}: {_last(settings.folder)}")
            elif not any_case:
                raise NoDevice(f"the process ended with {code}: {_last(settings.folder)}")
            return
        if line.startswith(BEGIN):
            current, began, any_case = by_name[line.removeprefix(BEGIN)], time.monotonic(), True
            until = began + limit_of(current, settings, rates)
        elif line.startswith(END):
            current, until = None, time.monotonic() + LONGEST_START
        else:
            say(f"  {line}")


def _last(folder: Path) -> str:
    """The last line that a process has said on stderr."""
    lines = [x for x in (folder / "log.txt").read_text(errors="replace").splitlines() if x.strip()]
    return f"{lines[-1][:300]} (log.txt has more)" if lines else "it said nothing"
