"""The search behind the defaults of `experiments.finetune`, on the dev split only.

Every combination of the options given is run for every seed; one JSON line a run, runs
already in the file are skipped, so the search can be stopped and gone on with.
"""

import dataclasses
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import finetune, job
from hiso_jax import simulation

AXES = ("method", "learning_rate", "scale", "label_norm", "length", "batch_size",
        "num_perturbations", "rounds")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Search:
    """Grid search on the dev split; every option takes several values."""

    method: tuple[str, ...] = ("decomfl", "hiso")
    """Methods; all get the same grid."""
    learning_rate: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
    """Peak learning rates; they fall linearly to 0."""
    scale: tuple[float, ...] = (finetune.Options.scale,)
    """Scale of the cosines."""
    label_norm: tuple[float, ...] = (finetune.Options.label_norm,)
    """Length of the label embeddings at the start."""
    length: tuple[int, ...] = (finetune.Options.length,)
    """Tokens a text is cut to."""
    batch_size: tuple[int, ...] = (finetune.Options.batch_size,)
    """Examples of a client in a round."""
    num_perturbations: tuple[int, ...] = (finetune.Options.num_perturbations,)
    """Scalars a round."""
    rounds: tuple[int, ...] = (finetune.Options.rounds,)
    """Rounds."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    out: Path = Path("runs/search.jsonl")
    """One row a run."""
    model: Path | None = None
    """Folder of the model; by default the installed package's."""


def one(problem: Any, point: dict[str, Any], seed: int) -> dict[str, Any]:
    """Run one point of the grid; return what it reached on the dev split."""
    options = dataclasses.replace(
        finetune.Options(), seed=seed, **{k: v for k, v in point.items() if k != "learning_rate"}
    )
    alg = job.algorithm(options, problem, point["learning_rate"])
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
    ):
        state = report.state
        if not np.isfinite(float(report.metrics.loss)) or float(report.metrics.loss) > 20:
            break  # diverged
    sums = simulation.evaluate(score, state.params, problem.dev, batch_size=64)
    return dict(
        dev_accuracy=float(sums["correct"] / sums["count"]),
        dev_loss=float(sums["loss"] / sums["count"]),
        rounds_done=int(state.round),
        seconds=round(time.perf_counter() - start, 1),
    )


def best(rows: list[dict[str, Any]]) -> Table:
    """Mean and spread over the seeds, best first."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[a] for a in AXES), []).append(row["dev_accuracy"])
    table = Table(*AXES, "dev accuracy", "spread", "seeds")
    for point, values in sorted(groups.items(), key=lambda g: -float(np.mean(g[1]))):
        cells = [f"{v:g}" if isinstance(v, float) else str(v) for v in point]
        table.add_row(*cells, f"{np.mean(values):.1%}", f"{np.std(values):.1%}", str(len(values)))
    return table


def search(options: Search) -> None:
    """Run what is missing in the grid and print the table."""
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows = [json.loads(line) for line in lines]
    grid = [dict(zip(AXES, values, strict=True))
            for values in itertools.product(*(getattr(options, axis) for axis in AXES))]  # fmt: skip
    done = {tuple(row[a] for a in (*AXES, "seed")) for row in rows}
    problems: dict[Any, Any] = {}
    with open(options.out, "a") as file:
        for point, seed in track(list(itertools.product(grid, range(options.seeds)))):
            if (*point.values(), seed) in done:
                continue
            shape = (point["length"], point["scale"], point["label_norm"])
            if shape not in problems:
                problems[shape] = finetune.docstring_topics(*shape, model=options.model)
            row = point | {"seed": seed} | one(problems[shape], point, seed)
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    Console().print(best([r for r in rows if {a: r[a] for a in AXES} in grid]))


if __name__ == "__main__":
    import tyro

    search(tyro.cli(Search))
