"""Accuracy against epsilon, with noise on the sum or on every client's scalars, tuned alike.

MNIST by softmax regression, and SST-2 by a head on a frozen sentence encoder, over a hundred to
ten thousand clients. Who takes part is known, and clients take turns, so each answers for the
rounds that it is in. Rates and clips of every cell are searched in the same way, on the dev split
with seed 0; the test split is looked at with three seeds.

Noise is drawn by the server in all of them: `privacy.distributed` with nobody missing has the law
of `privacy.central`, and C clients that add noise of their own have that of a sum with sqrt(C)
times as much (to less than a double holds, see `hiso_jax.privacy.mechanisms`). Each is charged
as what it stands for. Runs that differ in rate and clip only share clients, batches and
directions, and are computed in one program.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import hiso_jax as hj
from experiments import private_tasks
from hiso_jax import federation, privacy
from hiso_jax._engine import checks
from hiso_jax.federation import private
from hiso_jax.train import curves, report, results
from hiso_jax.train import rows as files


class Size(NamedTuple):
    """How many clients take part."""

    clients: int  # M
    asked: int  # C, a round
    batch_size: int  # examples of a client


SIZES = {
    "mnist": (Size(10_000, 1_000, 4), Size(1_000, 200, 16), Size(100, 50, 32)),
    "sst2": (Size(6_920, 692, 1), Size(1_000, 200, 8), Size(100, 50, 32)),
}
"""The most clients come first; SST-2 has 6,920 sentences, so there a client is one of them."""
TITLES = {"mnist": "MNIST, 14 x 14 pixels, linear", "sst2": "SST-2, head on a frozen MiniLM"}
CLIPS = {"mnist": (2.0, 8.0), "sst2": (16.0, 64.0)}
"""Of the first look: half of the clients' scalars are longer than the second at the beginning.
Without noise there is that one, or none at all."""
STEPS = {"mnist": (0.32, 1.28, 5.12, 20.48), "sst2": (0.08, 0.32, 1.28, 5.12, 20.48)}
"""Clip times learning rate, of the first look."""
FURTHER = 3
"""Times that the search goes on where the best rate is the lowest or highest of those tried."""


@dataclasses.dataclass(frozen=True)
class Private:
    """Accuracy at several epsilons: tuned runs, a row each, and a table of them."""

    mnist: Path | None = None
    """Folder with MNIST's four IDX files; by default they come from the hub."""
    sst2: Path | None = None
    """Folder with train.tsv, dev.tsv and test.tsv, ``sentence<TAB>label``."""
    tasks: tuple[str, ...] = ("mnist", "sst2")
    """Which tasks."""
    clients: tuple[int, ...] = ()
    """Which numbers of clients; all by default."""
    kinds: tuple[str, ...] = ("none", "central", "local")
    """Without noise, on the sum, on each client's scalars."""
    epsilons: tuple[float, ...] = (8.0, 2.0, 4.0, 1.0)
    """Budgets."""
    rounds: int = 200
    """Of a run."""
    num_perturbations: int = 20
    """Scalars of a client and round."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    out: Path = Path("runs/private.jsonl")
    """One row a run; runs in it are not repeated."""
    picture: Path | None = None
    """Where to draw accuracy against epsilon, a PNG."""
    only_show: bool = False
    """Run nothing, show what is there."""


class Cell(NamedTuple):
    """What is tuned: a place in the table."""

    task: str
    size: Size
    kind: str
    epsilon: float  # 0: no noise


def cells(options: Private) -> list[Cell]:
    """Those that the options ask for."""
    kinds = [(kind, e) for kind in options.kinds if kind != "none" for e in options.epsilons]
    kinds = [("none", 0.0)] * ("none" in options.kinds) + kinds
    return [
        Cell(task, size, *kind)
        for task in options.tasks
        for size in SIZES[task]
        for kind in kinds
        if not options.clients or size.clients in options.clients
    ]


def own_rounds(clients: federation.Clients, rounds: int, count: int, seed: int) -> int:
    """Rounds of the client that is drawn most, which the public seed tells beforehand."""
    drawn = Counter(n for r in range(rounds) for n in clients.sample(count, r, seed, "balanced"))
    return max(drawn.values())


def noises(options: Private, cell: Cell, most: int) -> tuple[float, float]:
    """Noise, in clips, on the sum: what a mechanism adds, and what its accountant takes it for.

    They are one but for local noise, of which each client is charged for its own.
    """
    size = cell.size
    noise = privacy.calibrate(
        cell.epsilon, options.delta, rounds=options.rounds, clients=size.clients,
        asked=size.asked, own_rounds=most,
    )  # fmt: skip
    # Local: any data for any other, so twice the sensitivity; and the noise of all adds up.
    return (noise if cell.kind == "central" else 2 * noise * math.sqrt(size.asked)), noise


class Plain(private.Simulated):
    """Rounds without noise, clipped or not: what the noise is compared with."""

    def __init__(self, clip: float | None):
        super().__init__(privacy.Terms(), bytes(32), "experiment")
        self._clip = clip

    def __call__(
        self,
        round: int,
        names: list[str],
        scalars: np.ndarray,
        weights: np.ndarray,
        own: Any = None,
    ) -> private.Summed:
        """The record of a round."""
        if self._clip is not None:
            norm = np.sqrt((scalars**2).sum((1, 2), keepdims=True))
            scalars = scalars * np.minimum(1, self._clip / np.maximum(norm, 1e-30))
        return private.Summed(scalars.mean(0), {}, None)


Point = dict[str, Any]
"""clip and learning_rate of a run."""


@functools.lru_cache(2)
def _programs(options: Private, task: str, clients: int) -> tuple[Any, ...]:
    """The problem, and its algorithm's functions over several states at one key and round."""
    problem = private_tasks.build(task, {"mnist": options.mnist, "sst2": options.sst2}, clients)
    alg = hj.decomfl(problem.loss_fn, 1.0, num_perturbations=options.num_perturbations,
                     distribution="rademacher")  # fmt: skip
    one: Any = None  # for all
    axes = hj.State(0, one, one, 0)  # what is stacked
    probe = jax.jit(jax.vmap(lambda state, batches: alg.probe(state, batches), (axes, None)))
    advance = jax.jit(jax.vmap(alg.advance, (axes, 0, 0), axes))
    return problem, alg, probe, advance, jax.jit(problem.score)


def accuracies(
    options: Private, cell: Cell, seed: int, points: list[Point]
) -> list[tuple[float, float]]:
    """Accuracy on dev and test after runs that differ in clip and learning rate.

    Raises:
      AssertionError: a run has given away more than its epsilon.
    """
    size = cell.size
    problem, alg, probe, advance, score = _programs(options, cell.task, size.clients)
    summed: list[private.Simulated] = [Plain(p["clip"]) for p in points]
    if cell.epsilon:
        most = own_rounds(problem.clients, options.rounds, size.asked, seed)
        added, charged = noises(options, cell, most)
        spent = privacy.epsilon_of({(charged, 1.0): most}, options.delta)
        assert spent <= cell.epsilon, f"epsilon: {spent} of {cell.epsilon}"
        # A secret that can be drawn again: this is a measurement, nobody's data.
        secret = np.random.default_rng(seed).bytes(32)
        budget = cell.epsilon if cell.kind == "central" else None
        summed = [
            private.Simulated(
                privacy.Terms.of(
                    privacy.central(p["clip"], added, clients=size.asked), budget, options.delta
                ),
                secret, "experiment",
            )
            for p in points
        ]  # fmt: skip
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(seed))
    copies = lambda x: jnp.stack([x] * len(points))  # noqa: E731
    state = state._replace(params=jax.tree.map(copies, state.params),
                           rule=jax.tree.map(copies, state.rule))  # fmt: skip
    rates = jnp.array([p["learning_rate"] for p in points], jnp.float32)
    for round in range(options.rounds):
        names = problem.clients.sample(size.asked, round, seed, "balanced")
        batches = problem.clients.batches(names, round, size.batch_size, seed=seed)
        scalars = np.asarray(probe(state, batches))
        ones = np.ones(len(names), np.float32)
        records = [
            one(round, names, s, ones).record for one, s in zip(summed, scalars, strict=True)
        ]
        state = advance(state, np.stack(records), rates * (1 - round / options.rounds))
    found = []
    for i in range(len(points)):
        params = jax.tree.map(lambda x, i=i: x[i], state.params)
        each = (federation.evaluate(score, params, data, 4096)
                for data in (problem.dev, problem.test))  # fmt: skip
        dev, test = (problem.metric_value(sums)[1] for sums in each)
        found.append((dev, test))
    return found


def _row(options: Private, cell: Cell, seed: int, point: Point) -> dict[str, Any]:
    """What names a run."""
    about = dict(task=cell.task, kind=cell.kind, epsilon=cell.epsilon) | cell.size._asdict()
    about |= dict(rounds=options.rounds, num_perturbations=options.num_perturbations,
                  delta=options.delta)  # fmt: skip
    return about | point | dict(seed=seed)


def best(rows: list[dict[str, Any]]) -> Point:
    """Clip and rate of the highest accuracy on dev with seed 0; of several, the lowest rate."""
    first = [r for r in rows if r["seed"] == 0]
    top = max(first, key=lambda r: (r["dev"], -r["learning_rate"]))
    return {name: top[name] for name in ("clip", "learning_rate")}


def tune(options: Private, cell: Cell, add: Any, rows: list[dict[str, Any]]) -> None:
    """The runs of a cell that there is no row of: all cells are searched in the same way."""

    def run(seed: int, points: list[Point]) -> list[dict[str, Any]]:
        wanted = [_row(options, cell, seed, point) for point in points]
        if missing := files.missing(wanted, rows):
            given = [{k: r[k] for k in ("clip", "learning_rate")} for r in missing]
            found = accuracies(options, cell, seed, given)
            for row, (dev, test) in zip(missing, found, strict=True):
                rows.append(row | {"dev": dev, "test": test})
                add(rows[-1])
        return files.of(wanted, rows)

    low, high = CLIPS[cell.task]
    # Rates of runs without a clip are those of the second one: it lets most go by.
    clips = [(low, low), (high, high)] if cell.epsilon else [(high, high), (None, high)]
    seen = run(0, [dict(clip=c, learning_rate=s / by) for c, by in clips for s in STEPS[cell.task]])
    top = best(seen)
    seen += run(0, [top | {"learning_rate": top["learning_rate"] * f} for f in (0.5, 2.0)])
    for _ in range(FURTHER):
        if not edge(seen, top := best(seen)):
            break
        seen += run(0, [top | {"learning_rate": top["learning_rate"] * f} for f in (0.5, 2.0)])
    for seed in range(1, options.seeds):
        run(seed, [best(seen)])


def edge(rows: list[dict[str, Any]], top: Point) -> bool:
    """Whether no rate below, or none above the chosen one was tried with its clip."""
    rates = [r["learning_rate"] for r in rows if r["clip"] == top["clip"] and r["seed"] == 0]
    return top["learning_rate"] in (min(rates), max(rates))


def _found(
    options: Private, rows: list[dict[str, Any]]
) -> Iterator[tuple[Cell, Point, np.ndarray, bool]]:
    """Cells that have rows: what was chosen, its test accuracies, whether it is at an edge."""
    for cell in cells(options):
        named = _row(options, cell, 0, {})
        own = [r for r in rows if all(r.get(k) == v for k, v in named.items() if k != "seed")]
        if not any(r["seed"] == 0 for r in own):
            continue
        top = best(own)
        chosen = [r for r in own if all(r[k] == v for k, v in top.items())]
        yield cell, top, np.array([r["test"] for r in chosen]), edge(own, top)


def table(options: Private, rows: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table, header first."""
    lines = [["task", "clients", "a round", "noise", "epsilon", "clip", "learning rate", "seeds",
              "test accuracy, %", "below none"]]  # fmt: skip
    plain: dict[tuple[str, Size], float] = {}
    for cell, top, tests, last in _found(options, rows):
        tests = 100 * tests
        if not cell.epsilon:
            plain[cell.task, cell.size] = tests.mean()
        none = plain.get((cell.task, cell.size))
        below = "" if none is None or not cell.epsilon else f"{none - tests.mean():.1f}"
        clip = "none" if top["clip"] is None else f"{top['clip']:g}"
        lines.append([
            cell.task, f"{cell.size.clients:,}", f"{cell.size.asked:,}", cell.kind,
            f"{cell.epsilon:g}" if cell.epsilon else "none", clip,
            f"{top['learning_rate']:g}" + " (edge)" * last,
            str(len(tests)), curves.spread(tests, "{:.1f}".format), below,
        ])  # fmt: skip
    return lines


def pivot(options: Private, rows: list[dict[str, Any]]) -> list[list[str]]:
    """The same, epsilons side by side and without what was chosen; header first."""
    epsilons = sorted(options.epsilons, reverse=True)
    header = ["task", "clients, a round", "noise on", "none", *(f"{e:g}" for e in epsilons)]
    cells_: dict[tuple[str, Size, str], dict[float, str]] = {}
    for cell, _, tests, _ in _found(options, rows):
        shown = curves.spread(100 * tests, "{:.1f}".format)
        cells_.setdefault((cell.task, cell.size, cell.kind), {})[cell.epsilon] = shown
    where = {"central": "the sum", "local": "each client's"}
    lines = [
        [task, f"{size.clients:,}, {size.asked:,}", where[kind],
         cells_.get((task, size, "none"), {}).get(0.0, "") if kind == "central" else "",
         *(own.get(e, "") for e in epsilons)]
        for (task, size, kind), own in cells_.items()
        if kind in where
    ]  # fmt: skip
    return [header, *lines]


def draw(options: Private, rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against epsilon, a panel a task and a color a number of clients."""
    found = list(_found(options, rows))
    tasks = list(dict.fromkeys(cell.task for cell, *_ in found))
    picture = report.blank(5 * len(tasks), 4.4)
    for axis, task in zip(np.atleast_1d(picture.subplots(1, len(tasks))), tasks, strict=True):
        for color, size in zip(("C0", "C1", "C2"), SIZES[task], strict=False):
            for kind, style in (("central", "-"), ("local", ":")):
                own = sorted(
                    (c.epsilon, 100 * t.mean(), 100 * curves.deviation(t))
                    for c, _, t, _ in found
                    if (c.task, c.size, c.kind) == (task, size, kind)
                )
                if own:
                    label = f"{size.clients:,}, {'sum' if kind == 'central' else 'local'}"
                    axis.errorbar(*zip(*own, strict=True), color=color, linestyle=style,
                                  marker=".", label=label)  # fmt: skip
            for cell, _, tests, _ in found:
                if (cell.task, cell.size, cell.kind) == (task, size, "none"):
                    axis.axhline(100 * tests.mean(), color=color, linestyle="--", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"epsilon at delta = {options.delta:g}",
                 ylabel="test accuracy (%)", title=TITLES[task])  # fmt: skip
        axis.set_xticks(sorted(options.epsilons), [f"{e:g}" for e in sorted(options.epsilons)])
        axis.minorticks_off()
        axis.legend(title="clients, noise on", fontsize="small", ncols=3, loc="upper center",
                    bbox_to_anchor=(0.5, -0.18))  # fmt: skip
    report.framed(picture).savefig(path, dpi=120)


def main(options: Private) -> None:
    """Run what is missing, print the table, as Markdown too, and draw."""
    for name in ("rounds", "num_perturbations", "seeds"):
        checks.count(f"--{name.replace('_', '-')}", getattr(options, name))
    for name, known in (("tasks", tuple(SIZES)), ("kinds", ("none", "central", "local"))):
        for value in getattr(options, name):
            checks.choice(f"--{name}", value, known)
    rows = files.read(options.out)
    if not options.only_show:
        with files.append(options.out) as add:
            for cell in track(cells(options), "cells"):
                tune(options, cell, add, rows)
    for header, *lines in (table(options, rows), pivot(options, rows)):
        results.show(header, lines)
    if options.picture:
        draw(options, rows, options.picture)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Private))
