"""The search behind the learning rates of the jobs, on the dev split only.

Every combination of the options given is run for every seed; one JSON line a run, runs
already in the file are skipped, so the search can be stopped and gone on with.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import digits, finetune, job
from hiso_jax import simulation

TASKS: dict[str, tuple[Any, Any]] = {
    "finetune": (finetune.Options, finetune.build),
    "sst2": (
        lambda **own: finetune.Options(task="sst2", length=32, batch_size=8, **own),
        finetune.build,
    ),
    "digits": (digits.Options, lambda options: digits.digits()),
}
AXES = ("method", "learning_rate", "batch_size", "num_perturbations", "rounds", "distribution")


@dataclasses.dataclass(frozen=True)
class Search:
    """Grid search on the dev split; an option takes several values, none is the job's default."""

    task: Literal["finetune", "sst2", "digits"] = "finetune"
    """The job whose options are searched."""
    data: Path | None = None
    """File or folder of the data, for sst2."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    method: tuple[str, ...] = tuple(job.METHODS)
    """Methods; all get the same grid."""
    learning_rate: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    """Peak learning rates; they fall linearly to 0."""
    batch_size: tuple[int, ...] = ()
    """Examples of a client in a round."""
    num_perturbations: tuple[int, ...] = ()
    """Scalars a round."""
    rounds: tuple[int, ...] = ()
    """Rounds."""
    distribution: tuple[str, ...] = ()
    """Noise."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    out: Path = Path("runs/search.jsonl")
    """One row a run."""


def one(options: job.Options, problem: Any) -> dict[str, Any]:
    """Run one point of the grid; return what it reached on the dev split."""
    seed = options.seed
    alg = job.algorithm(options, problem, options.learning_rate or 0.0)
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(seed))
    score, start = jax.jit(problem.score), time.perf_counter()
    for report in simulation.run(
        alg,
        state,
        problem.clients,
        rounds=options.rounds,
        clients_per_round=options.clients_per_round,
        batch_size=options.batch_size,
        seed=seed,
        sampling=options.sampling,
        prepare=problem.prepare,
    ):
        state = report.state
        if not np.isfinite(float(report.metrics.loss)) or float(report.metrics.loss) > 20:
            break  # diverged
    sums = simulation.evaluate(
        score, state.params, problem.dev, batch_size=64, prepare=problem.prepare
    )
    loss, figure = problem.figure(sums)
    return dict(
        dev_accuracy=figure,
        dev_loss=loss,
        rounds_done=int(state.round),
        seconds=round(time.perf_counter() - start, 1),
    )


def best(rows: list[dict[str, Any]]) -> Table:
    """Means over the seeds and the spread of the accuracy, lowest loss first."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        result = (row["dev_loss"], row["dev_accuracy"])
        groups.setdefault(tuple(row[a] for a in AXES), []).append(result)
    table = Table(*AXES, "dev loss", "dev accuracy", "spread", "seeds")
    for point, results in sorted(
        groups.items(), key=lambda g: float(np.mean([r[0] for r in g[1]]))
    ):
        loss, accuracy = np.mean(results, 0)
        spread = np.std([r[1] for r in results])
        cells = [f"{v:g}" if isinstance(v, float) else str(v) for v in point]
        table.add_row(*cells, f"{loss:.3f}", f"{accuracy:.1%}", f"{spread:.1%}", str(len(results)))
    return table


def search(options: Search) -> None:
    """Run what is missing in the grid and print the table."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    make, build = TASKS[options.task]
    defaults = make(data=options.data, columns=options.columns) if options.data else make()
    axes = {axis: getattr(options, axis) or (getattr(defaults, axis),) for axis in AXES}
    grid = [dict(zip(AXES, point, strict=True)) for point in itertools.product(*axes.values())]
    done = {(row["task"], *(row[a] for a in AXES), row["seed"]) for row in rows}
    problem = build(defaults)
    with open(options.out, "a") as file:
        for point, seed in track(list(itertools.product(grid, range(options.seeds)))):
            if (options.task, *point.values(), seed) in done:
                continue
            row = {"task": options.task, "seed": seed} | point
            row |= one(dataclasses.replace(defaults, seed=seed, **point), problem)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    mine = [r for r in rows if r["task"] == options.task and {a: r[a] for a in AXES} in grid]
    Console().print(best(mine))


if __name__ == "__main__":
    import tyro

    search(tyro.cli(Search))
