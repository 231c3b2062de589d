"""Methods compared fairly: the same budget of learning rates and the same seeds for each.

Every combination of methods, learning rates, seeds and what else is varied is one run and
one JSON line, appended when the run is over; runs that are in the file are skipped, so a
comparison can be stopped and gone on with, and grown. `experiments.results` draws it.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from hiso_jax import federation
from hiso_jax._engine import checks
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import folders, job, methods, report, results
from hiso_jax.train import settings as limits

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("hiso_jax.train.finetune", {}),
    "sst2": ("hiso_jax.train.finetune", dict(task="sst2", length=32, batch_size=8)),
    "digits": ("hiso_jax.train.digits", {}),
    "mnist": ("experiments.mnist", {}),
}
"""Modules of jobs, with `Options` and `build`, and what options they have here."""


def options_of(task: str, **given: Any) -> job.Options:
    """The options of the job that a task is, with those given in their place.

    Raises:
      ValueError: there is no such task, or it is of the experiments, which only a clone has.
    """
    if task not in TASKS:
        raise ValueError(f"--task: expected one of {', '.join(TASKS)}, got {task!r}")
    module, own = TASKS[task]
    return _module(module).Options(**dict(eval_examples=0) | own | given)


def build(task: str, options: job.Options) -> Problem:
    """The problem that a task's options ask for."""
    return _module(TASKS[task][0]).build(options).at_most(options.eval_examples)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "experiments":
            raise
        raise ValueError(f"--task: {name} is in a clone of hiso_jax only; run it there") from None


COMMON = {field.name for field in dataclasses.fields(job.Options)}
"""Options of every job, which no problem depends on but for the seed."""
SET = {
    "method",
    "learning_rate",
    "seed",
    "out",
    "resume",
    "compare",
    "distributed",
    "data",
    "columns",
}
"""Options of a job that are none to vary: `Compare` has its own, or no run depends on them."""
DIVERGED = 20.0
"""A training loss above which a run is given up."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Run a grid of methods, learning rates and seeds on the dev split, and print the best."""

    task: Literal["finetune", "sst2", "digits", "mnist"] = "digits"
    """The job whose options are used."""
    method: tuple[str, ...] = job.COMPARED
    """Methods, as of the job's --method."""
    learning_rate: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
    """Peak learning rates; they fall linearly to 0."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    vary: tuple[str, ...] = ()
    """Other options of the job, each with the values to run: num_perturbations=5,20."""
    data: Path | None = None
    """File or folder of the data, for sst2 and mnist."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    processes: int = 1
    """Runs at a time; the processors are dealt out among them."""
    out: Path = Path("runs/compare.jsonl")
    """One row a run."""


def _truth(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def varied(kind: type, texts: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """Parse ``name=value,value`` by the types of a job's options.

    Raises:
      SystemExit: no such option, or a value it does not take.
    """
    hints, axes = get_type_hints(kind), {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        name = limits.RENAMED.get(name, name)
        if not equals or name not in hints or name in SET:
            sys.exit(f"--vary: expected name=value,value with an option of the job that is not set "
                     f"elsewhere, got {text!r}")  # fmt: skip
        kinds = {int: int, float: float, bool: _truth}
        read = next((kinds[k] for k in (hints[name], *get_args(hints[name])) if k in kinds), str)
        try:
            axes[name] = tuple(read(value) for value in values.split(","))
        except (ValueError, KeyError):
            sys.exit(f"--vary: expected values of {name}, got {values!r}")
    return axes


@functools.lru_cache(1)
def _problem(task: str, options: job.Options) -> Problem:
    return build(task, options)


def _only_data(options: job.Options) -> job.Options:
    """The options, with those that no problem depends on at their defaults."""
    start = type(options)()
    return dataclasses.replace(options, **{name: getattr(start, name) for name in COMMON})


class OtherStart(Exception):
    """A run that cannot be compared with those in the file."""


def one(task: str, options: job.Options, start: float | None = None) -> dict[str, Any]:
    """Run one point of the grid; return its row, less what names it.

    Raises:
      OtherStart: it does not begin at the dev loss `start`.
    """
    problem, began = _problem(task, _only_data(options)), time.perf_counter()
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
            diverged = not float(step.metrics.loss) <= DIVERGED
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
        passes_per_round=round(methods.forward_passes(alg, shares), 3),
        bytes_per_round=4 * methods.floats(alg, problem),
        seconds=round(time.perf_counter() - began, 1),
    )


def _plain(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def defaults(options: Any) -> job.Options:
    """The options of the `task` named, with its `data` and `columns`, if they are given."""
    given = {name: value for name in ("data", "columns") if (value := getattr(options, name))}
    known = {field.name for field in dataclasses.fields(options_of(options.task))}
    if lost := given.keys() - known:
        raise ValueError(f"--{sorted(lost)[0]}: {options.task} reads none")
    return options_of(options.task, **given)


def grid(options: Compare) -> Iterator[tuple[dict[str, Any], job.Options]]:
    """What names a run, and its options."""
    start = defaults(options)
    axes = varied(type(start), options.vary)
    for name in ("seeds", "processes"):
        checks.count(f"--{name}", getattr(options, name))
    if not options.method or not options.learning_rate:
        raise ValueError("--method, --learning-rate: expected at least one of each")
    for method in options.method:
        methods.check(method)
        for rate, seed, *values in itertools.product(
            options.learning_rate, range(options.seeds), *axes.values()
        ):
            own = dict(zip(axes, values, strict=True))
            point = dataclasses.replace(
                start, **dict(method=method, learning_rate=rate, seed=seed) | own
            )
            limits.check(point)
            yield dict(task=options.task, **settings(point)), point


def settings(options: job.Options) -> dict[str, Any]:
    """All options that a run's figures depend on."""
    left_out = ("out", "resume", "distributed", "compare", "mesh", "snapshot_every", "data")
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in left_out}
    for name in ("upper_directions", "upper_layers"):  # one depth is a number in a row
        kept[name] = kept[name][0] if len(kept[name]) == 1 else kept[name] or 0
    if "task" in kept:  # which is the job, in a row
        kept["text_task"] = kept.pop("task")
    return json.loads(json.dumps(kept, default=str))


def _start(rows: list[dict[str, Any]], name: dict[str, Any]) -> float | None:
    """Where runs of the same problem began, which have the same model then and the same data."""
    same = name.keys() - (COMMON - {"seed"})
    found = (row["curve"][0][1] for row in rows if all(row.get(k) == name[k] for k in same))
    return next(found, None)


def _own_processors(numbers: Any, share: int) -> None:
    """Keep a worker to its share of the processors, so that runs do not wait for each other."""
    every = sorted(os.sched_getaffinity(0))
    first = numbers.get() * share % len(every)  # there may be more workers than processors
    os.sched_setaffinity(0, every[first : first + share])


def run(options: Compare) -> list[dict[str, Any]]:
    """Run what is missing in the grid; return the rows of the whole grid.

    Raises:
      SystemExit: options that are none, or rows in the file of another model or other data.
    """
    rows = results.read(options.out)
    named = lambda row: json.dumps({k: row[k] for k in wanted[0][0]}, sort_keys=True)  # noqa: E731
    try:
        wanted = list(grid(options))
    except (TypeError, ValueError) as error:
        sys.exit(str(error))
    done = {named(row) for row in rows if wanted[0][0].keys() <= row.keys()}
    missing = [(name, point) for name, point in wanted if named(name) not in done]
    spawn = multiprocessing.get_context("spawn")
    numbers = spawn.Queue()
    for number in range(options.processes):
        numbers.put(number)
    share = max(1, len(os.sched_getaffinity(0)) // options.processes)
    with (
        concurrent.futures.ProcessPoolExecutor(
            options.processes, spawn, _own_processors, (numbers, share)
        ) as pool,
        folders.append(options.out) as file,
    ):
        runs = {
            pool.submit(one, options.task, point, _start(rows, name)): name
            for name, point in missing
        }
        for future in track(concurrent.futures.as_completed(runs), "runs", len(runs)):
            try:
                row = runs[future] | future.result()
            except (OtherStart, OSError, ValueError) as error:
                pool.shutdown(cancel_futures=True)
                if not rows and not options.out.stat().st_size:
                    options.out.unlink()
                sys.exit(str(error))
            rows.append(row)
            file.write(report.dumps(row) + "\n")
            file.flush()
    asked = {named(name) for name, _ in wanted}
    return [row for row in rows if wanted[0][0].keys() <= row.keys() and named(row) in asked]


def cli() -> None:
    """Parse the command line, run what is missing and print the table."""
    import tyro

    with report.door():
        report.console.print(results.table(run(tyro.cli(Compare))))
