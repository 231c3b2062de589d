"""Methods compared fairly: the same search for a learning rate and the same seeds for each.

Every combination of methods, learning rates, seeds and what else is varied is one run and
one JSON line, appended when the run is over; runs that are in the file are skipped, so a
comparison can be stopped and gone on with, and grown. What is run is said by options, or by
a file, see `hiso_jax.train.grids`. A page beside the rows has its curves; `hiso results` has
tables and figures.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import federation
from hiso_jax._engine import checks, files
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import (
    comparison,
    curves,
    depth,
    grids,
    job,
    methods,
    report,
    results,
    rows,
    selecting,
    settings,
)  # fmt: skip
from hiso_jax.train.options import TASKS, build, defaults, varied
from hiso_jax.train.progress import duration
from hiso_jax.train.rows import Row

__all__ = ["TASKS", "Compare", "build", "cli", "defaults", "one", "plan", "run", "varied"]

COMMON = {field.name for field in dataclasses.fields(job.Options)} - {"eval_examples"}
"""Options of every job that no problem depends on, but for the seed."""
DIVERGED = 20.0
"""A training loss above which a run is given up."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Run a grid of methods, learning rates and seeds on the dev split, and print the best."""

    grid: Path | None = None
    """A TOML file that says what is run, in the place of all other options but --data, --out,
    --processes and --dry-run; there are some in experiments/grids."""
    dry_run: bool = False
    """Only say how many runs are missing."""
    task: Literal["finetune", "sst2", "llm", "digits", "images", "mnist"] = "digits"
    """The job whose options are used; sst2 is finetune on SST-2, and mnist is in a clone only."""
    method: tuple[str, ...] = job.COMPARED
    """Methods, as of the job's --method: hiso, "hiso(update_steps=all)"."""
    learning_rate: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
    """Peak learning rates, falling linearly to 0; the default is for the digits."""
    seeds: int = grids.FIRST_LOOK
    """Number of seeds, from 0 on."""
    extend: bool = False
    """While the best rate is the lowest or highest, go on by the same factor."""
    refine: bool = False
    """Then run the geometric means of the best rate and its two neighbors."""
    seeds_at_best: int = 1
    """Seeds at the best rate in the end, if more than --seeds."""
    by: Literal["loss", "metric"] = "loss"
    """What the best rate is chosen by, on the dev split at the end."""
    vary: tuple[str, ...] = ()
    """Other options of the job, each with the values to run: num_perturbations=5,20."""
    data: Path | None = None
    """File or folder of the data, for tasks that read one."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    processes: int = 1
    """Runs at a time; the processors are dealt out among them."""
    out: Path | None = None
    """One row a run; by default runs/compare.jsonl, or what the grid says."""


@functools.lru_cache(1)
def _problem(task: str, options: job.Options) -> Problem:
    return build(task, options)


def _only_data(options: job.Options) -> job.Options:
    """The options, with those that no problem depends on at their defaults."""
    start = type(options)()
    return dataclasses.replace(options, **{name: getattr(start, name) for name in COMMON})


class OtherStart(Exception):
    """A run that cannot be compared with those in the file."""


def one(task: str, options: job.Options, start: float | None = None) -> Row:
    """Run one point of the grid; return its row, less what names it.

    Raises:
      OtherStart: it does not begin at the dev loss `start`.
    """
    problem, began = _problem(task, _only_data(options)), time.perf_counter()
    found, options = options.upper_directions, depth.settle(options, problem)
    kept = ("num_perturbations", "upper_directions", "upper_layers")
    chosen = {"auto": {name: getattr(options, name) for name in kept}} if found == "auto" else {}
    problem = selecting.settle(options, problem)
    looks = selecting.passes(options, problem)
    chosen |= {} if options.select is None else {"look_passes_per_round": round(looks, 3)}
    alg = job.algorithm(options, problem, options.learning_rate or 0.0)
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(options.seed))
    score = jax.jit(problem.score)
    shares = methods.shares(options, problem)

    def evaluate(data: Any) -> tuple[float, float]:
        sums = federation.evaluate(score, state.params, data, 256, problem.prepare)
        return problem.metric_value(sums)

    curve, diverged = [(0, *evaluate(problem.dev))], False
    if start is not None and not np.isclose(curve[0][1], start, rtol=2e-3):
        raise OtherStart(
            f"--out: its rows of this task and seed begin at a dev loss of {start:.4g}, this run "
            f"at {curve[0][1]:.4g}: another model, or other data; give it a file of its own"
        )
    try:
        for step in job.rounds(options, problem, alg, state):
            state = step.state
            diverged = float(step.metrics.loss) > DIVERGED  # NaN: nobody has answered
            if diverged or step.round % options.eval_every == 0 or step.round == options.rounds:
                curve.append((step.round, *evaluate(problem.dev)))
            if diverged:
                break
    except FloatingPointError:
        diverged = True
    test = evaluate(problem.test)
    return dict(
        metric=problem.metric,
        curve=[[round, _plain(loss), _plain(figure)] for round, loss, figure in curve],
        test_loss=_plain(test[0]),
        test=_plain(test[1]),
        diverged=diverged,
        passes_per_round=round(methods.forward_passes(alg, shares) + looks, 3),
        bytes_per_round=4 * methods.floats(alg, problem),
        seconds=round(time.perf_counter() - began, 1),
        **chosen,
    )


def _plain(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def plan(options: Compare, named: Collection[str] = ()) -> grids.Grid:
    """What is to run: the file of --grid, or the one entry that the other options make.

    Args:
      options: as they were given.
      named: which of them were given on the command line, whatever their values.

    Raises:
      TypeError, ValueError: there is something that cannot be run; says what and where.
      SystemExit: --vary is none.
    """
    checks.count("--processes", options.processes)
    if options.out is not None and options.out.suffix == ".html":
        raise ValueError(f"--out: {options.out} is where the page would go; expected a file of "
                         "rows, .jsonl")  # fmt: skip
    start = Compare()
    if options.grid is not None:
        beside = ("grid", "data", "out", "processes", "dry_run")
        for field in dataclasses.fields(options):
            name = field.name
            other = getattr(options, name) != getattr(start, name) or name in named
            if name not in beside and other:
                raise ValueError(f"--{name.replace('_', '-')}: {options.grid} says what is run; "
                                 "expected no other option beside --grid than --data, --out, "
                                 "--processes and --dry-run")  # fmt: skip
        return grids.read(options.grid, options.data, options.out)
    own = defaults(options.task, options.data, options.columns)
    keys = ("method", "learning_rate", "seeds", "extend", "refine", "seeds_at_best", "by")
    given: dict[str, Any] = {key: getattr(options, key) for key in keys}
    shown = " ".join(options.method)
    one = grids.entry(shown, options.task, own, varied(type(own), options.vary), **given)
    return grids.Grid(options.out or Path("runs/compare.jsonl"), (one,))


def _start(known: list[Row], name: Row) -> float | None:
    """Where runs of the same problem began, which have the same model then and the same data."""
    same = name.keys() - (COMMON - {"seed"})
    found = (row["curve"][0][1] for row in known if all(row.get(k) == name[k] for k in same))
    return next(found, None)


def _end_with_parent() -> None:
    """Wait for the end of the process that wants the rows, and end: a run may take an hour more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _own_processors(numbers: Any, share: int) -> None:
    """Keep a worker to its share of the processors, so that runs do not wait for each other."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    every = sorted(os.sched_getaffinity(0))
    first = numbers.get() * share % len(every)  # there may be more workers than processors
    os.sched_setaffinity(0, every[first : first + share])


def run(options: Compare, named: Collection[str] = ()) -> list[Row]:
    """Run what is missing until nothing is; return the rows of the whole grid.

    Args:
      options: as they were given.
      named: as of `plan`.

    Raises:
      SystemExit: options that are none, or rows in the file of another model or other data.
    """
    try:
        grid = plan(options, named)
    except (TypeError, ValueError) as error:
        sys.exit(str(error))
    known = curves.read(grid.out)
    found = grids.Found(grid, known)
    try:
        data = _same_data(grid, found)
    except OSError as error:
        sys.exit(str(error))
    if options.dry_run:
        count(grid, found)
        return []
    if any(True for entry in grid.entries for _ in grids.missing(entry, found)):
        try:
            with rows.append(grid.out) as add:
                _run(options, grid, found, known, lambda row: add(row | data))
        except (OtherStart, OSError, ValueError) as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            sys.exit(f"\nstopped; {found.count} runs are in {grid.out}, and the same command "
                     "goes on")  # fmt: skip
    return grids.finished(grid, found)


def _same_data(grid: grids.Grid, found: grids.Found) -> Row:
    """What is added to rows: which data they are of.

    Raises:
      FileNotFoundError: there are none.
      SystemExit: rows of the grid are there, and are of other data.
    """
    path = getattr(grid.entries[0].points[0], "data", None)
    if path is None:
        return {}
    if not path.exists():
        raise FileNotFoundError(f"--data: {path} is not there")
    mark = files.fingerprint(path)
    if any(row.get("data", mark) != mark for row in grids.finished(grid, found)):
        sys.exit(f"--out: {grid.out} has these runs, of other data than {path}; give it a file of "
                 "its own")  # fmt: skip
    return {"data": mark}


@contextlib.contextmanager
def _ending(pool: concurrent.futures.ProcessPoolExecutor) -> Iterator[None]:
    """End the workers, and what they are at, if the block ends in an error or is interrupted."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    pool.shutdown()


def _run(
    options: Compare, grid: grids.Grid, found: grids.Found, known: list[Row], add: Any
) -> None:
    """Keep the processes busy: whenever a run is over, what is then missing is asked for."""
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.Queue()
    for number in range(options.processes):
        numbers.put(number)
    share = max(1, len(os.sched_getaffinity(0)) // options.processes)
    pool = concurrent.futures.ProcessPoolExecutor(
        options.processes, spawn, _own_processors, (numbers, share)
    )
    under_way: dict[concurrent.futures.Future[Row], Row] = {}
    submitted: set[str] = set()
    with _ending(pool), Progress(grid, found) as progress:
        while True:
            for entry in grid.entries:
                for name, point in grids.missing(entry, found):
                    if (key := json.dumps(name, sort_keys=True)) not in submitted:
                        submitted.add(key)
                        future = pool.submit(one, entry.task, point, _start(known, name))
                        under_way[future] = name
            if not under_way:
                return
            done, _ = concurrent.futures.wait(
                under_way, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                row = under_way.pop(future) | future.result()
                add(row)
                known.append(row)
                found.add(row)
                progress.note(row)


def count(grid: grids.Grid, found: grids.Found) -> None:
    """Print how many runs are missing, entry by entry."""
    total = 0
    for entry in grid.entries:
        now, left = len(list(grids.missing(entry, found))), grids.forecast(entry, found)
        total += left
        later = f", then at least {left - now} by how they end" * (left > now)
        report.say(f"{entry.name}: {now or 'nothing'} missing{later}")
    report.say(f"{total or 'nothing'} to run in all, for ", str(grid.out))


class Progress:
    """A bar; without a terminal, a line for every run that is over."""

    def __init__(self, grid: grids.Grid, found: grids.Found):
        self.grid, self.found = grid, found
        self.began, self.done = time.perf_counter(), 0
        self.bar = report.progress() if report.console.is_terminal else None
        self.task = self.bar.add_task("runs", total=self.left(), status="") if self.bar else None

    def left(self) -> int:
        """Runs that are missing, and those that will be at least."""
        return sum(grids.forecast(entry, self.found) for entry in self.grid.entries)

    def note(self, row: Row) -> None:
        """A run is over."""
        self.done += 1
        left, loss = self.left(), row["curve"][-1][1]
        ended = "diverged" if row["diverged"] or loss is None else f"dev loss {loss:.4g}"
        what = f"{methods.title(row['method'])} at {row['learning_rate']:g}, seed {row['seed']}"
        line = f"{what}: {ended}"
        if self.bar:
            total = self.done + left
            self.bar.update(self.task, completed=self.done, total=total, status=line)
            return
        time_left = (time.perf_counter() - self.began) / self.done * left
        about = f", about {duration(time_left)}" * bool(left)
        report.say(f"{line} ({duration(row['seconds'])}); {left} left{about}")

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()


def cli() -> None:
    """Parse the command line, run what is missing and print the table."""
    import tyro

    with report.door():
        options = tyro.cli(Compare)
        found, grid = run(options, settings.given(sys.argv[1:])), plan(options)
        chosen_by = "metric" if all(e.by == "metric" for e in grid.entries) else "loss"
        if not options.dry_run:
            report.console.print(results.table(found, chosen_by))
        if found:
            path = grid.out.with_suffix(".html")
            comparison.write(found, path, chosen_by)
            report.say("The curves, with methods to choose among: ", str(path))
