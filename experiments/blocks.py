"""What limits a scalar-only step on a language model: signal, noise and curvature, by block.

Trains with HiSo and looks now and then, by automatic differentiation, at what the scalars
cannot show one by one. A block is a layer's part of a leaf, or a leaf that has no layers.

With noise of covariance D a round's best expected decrease is
``P (g' D g)^2 / (2 s tr(D Hessian))``, with g the gradient and s the mean square of a scalar,
``E[g_b' D g_b]`` over the gradients g_b of what it is measured on: a round's batch if clients
share directions, a client's if each has its own, C P in all. So *per-client directions* gain C
times the one s over the other; and *block scales* what the best D with a number per block gains
over D = 1. Those are chosen on half of the examples and probes and judged on the other, since the
best of a hundred noisy ratios looks better than it is.

A direction that moves a part of the model only makes the same progress with that part's sums in
the place of all; the second table has it for every layer alone and with all that is above it,
beside what a pass from there on costs (`hiso_jax.Split`).
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from experiments.curvature import gain, show_figures
from hiso_jax._engine import files, trees
from hiso_jax.models import subsets
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import compare, finetune, job, methods, report, results


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Measure signal, noise and curvature while HiSo fine-tunes."""

    task: Literal["finetune", "sst2", "llm"] = "finetune"
    """The job whose options are used."""
    rounds: tuple[int, ...] = (0, 100, 300)
    """When to look."""
    data: Path | None = None
    """File or folder of the data, for sst2."""
    columns: tuple[str, ...] = ()
    """Names of its columns, if it has no header line."""
    vary: tuple[str, ...] = ()
    """Other options of the job, name=value: model=runs/pretrain, batch_size=32."""
    learning_rate: float = 8e-4
    """Of HiSo, constant."""
    examples: int = 2048
    """Training examples that the gradient is measured on."""
    piece: int = 128
    """Examples whose gradient is computed at a time."""
    probes: int = 32
    """Random vectors that traces are estimated with; their standard error is in the table."""
    out: Path = Path("runs/blocks.json")
    """Where the figures go, with those of each block."""


def dots(a: Any, b: Any) -> jax.Array:
    """Inner products of two trees of leaves by name, block by block, [blocks]."""

    def one(name: str, x: jax.Array) -> jax.Array:
        inside = tuple(range(1, x.ndim)) if subsets.stacked(name) else None
        return jnp.atleast_1d((x * b[name]).astype(jnp.float32).sum(inside))

    return jnp.concatenate([one(name, x) for name, x in a.items()])


def block_names(leaves: trees.Leaves) -> list[str]:
    """As `dots` puts them."""
    names = []
    for name, x in leaves.items():
        layers = range(len(x)) if subsets.stacked(name) else ()
        names += [f"{name}[{i}]" for i in layers] or [name]
    return names


BELOW, ABOVE = "below the layers", "above the layers"
PARTS = ["part", "g squared", "of a batch", "trace", "progress by it alone",
         "by it and all above", "share of a pass"]  # fmt: skip


def parts_of(leaves: trees.Leaves, upper: Collection[str]) -> list[str]:
    """The part of the model that each block belongs to, as `dots` puts them.

    Args:
      leaves: by name.
      upper: names of those that belong to an upper part of any number of layers.
    """
    parts = []
    for name, x in leaves.items():
        layers = [f"layer {i}" for i in range(len(x))] if subsets.stacked(name) else []
        parts += layers or [ABOVE if name in upper else BELOW]
    return parts


def by_layer(
    parts: list[str], blocks: Mapping[str, np.ndarray], cost: Callable[[int], float]
) -> tuple[list[str], list[list[str]]]:
    """The second table: shares of each part, and the progress of directions that move only it.

    Args:
      parts: of the blocks, from `parts_of`.
      blocks: figures by block.
      cost: number of layers, from the last -> share of a pass.
    """
    layers = [part for part in dict.fromkeys(parts) if part not in (BELOW, ABOVE)]
    order = [BELOW, *layers, *[ABOVE] * (ABOVE in parts)]
    inside = [np.array(parts) == part for part in order]
    signal, noise, trace = (
        np.array([blocks[kind][own].sum() for own in inside])
        for kind in ("signal", "noise", "trace")
    )

    def progress(moved: np.ndarray) -> str:
        # There is no best step along a loss that, to this precision, bends down.
        bends_up = trace[moved].sum() > 0 and trace.sum() > 0
        return f"{gain(moved.astype(float), signal, noise, trace):.2f}" if bends_up else ""

    lines, number = [], np.arange(len(order))
    for i, part in enumerate(order):
        shares = [f"{x[i] / x.sum():.1%}" for x in (signal, noise, trace)]
        above = len(layers) + 1 - i
        passes = "1" if not i else f"{cost(above):.2f}" if 0 < above < len(layers) else ""
        lines.append([part, *shares, progress(number == i), progress(number >= i), passes])
    return PARTS, lines


class Derivatives:
    """First and second derivatives of the loss on training examples, compiled once for a problem.

    Args:
      problem: whose loss it is.
      examples: how many, all clients' together; drawn once.
      piece: that are computed with at a time.
      multiple: of which the number of pieces is one.
    """

    def __init__(self, problem: Problem, examples: int, piece: int, multiple: int = 1):
        self.joined = problem.clients.columns
        count = len(next(iter(self.joined.values())))
        pieces = min(examples, count) // piece // multiple * multiple
        if not pieces:
            raise ValueError(f"examples: expected at least {multiple * piece}, got "
                             f"{min(examples, count)}")  # fmt: skip
        order = np.random.default_rng(0).permutation(count)
        self.pieces = np.split(order[: pieces * piece], pieces)
        self.problem = problem
        pick = lambda params: trees.select(params, problem.trainable)  # noqa: E731
        loss = lambda params, x, data: problem.loss_fn(trees.merge(params, x), data)  # noqa: E731
        slope = lambda params, data: jax.grad(loss, 1)(params, pick(params), data)  # noqa: E731

        def along(params: Any, v: Any, data: Any) -> Any:
            of = lambda x: jax.grad(loss, 1)(params, x, data)  # noqa: E731
            return jax.jvp(of, (pick(params),), (v,))[1]

        self.pick, self.slope, self.along = pick, jax.jit(slope), jax.jit(along)
        self.dots, self.loss = jax.jit(dots), jax.jit(problem.loss_fn)
        self.add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

    def data(self) -> list[dict[str, jax.Array]]:
        """All examples, piece by piece."""
        return [self.batch(piece) for piece in self.pieces]

    def batch(self, numbers: np.ndarray) -> dict[str, jax.Array]:
        """Training examples as the loss takes them."""
        data = {k: v[numbers] for k, v in self.joined.items()}
        data["weight"] = np.ones(len(numbers), np.float32)
        return {k: jnp.asarray(v) for k, v in self.problem.prepare(data).items()}

    def mean(self, slopes: Iterator[Any]) -> Any:
        """Mean of gradients, or of other trees."""
        total, count = next(slopes), 1
        for x in slopes:
            total, count = self.add(total, x), count + 1
        return jax.tree.map(lambda x: x / count, total)


class Look(Derivatives):
    """What limits a step, at a state of a run."""

    def __init__(
        self, problem: Problem, options: job.Options, examples: int, probes: int, piece: int = 128
    ):
        super().__init__(problem, examples, piece, multiple=4)
        self.options, self.probes = options, probes

    def rounds(self, params: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared gradients of rounds' batches and of clients', [blocks] each."""
        clients, size = self.options.clients_per_round, self.options.batch_size
        batches, alone = [], []
        for number in range(10_000, 10_000 + count):
            names = self.problem.clients.sample(clients, number, 0, self.options.sampling)
            own = self.problem.clients.batches(names, number, size, 1, 0)
            each = []
            for c in range(clients):
                data = self.problem.prepare({k: v[c, 0] for k, v in own.items()})
                each.append(self.slope(params, {k: jnp.asarray(v) for k, v in data.items()}))
                alone.append(self.dots(each[-1], each[-1]))
            together = self.mean(iter(each))
            batches.append(self.dots(together, together))
        return np.stack(batches).mean(0, np.float64), np.stack(alone).mean(0, np.float64)

    def __call__(self, state: hj.State) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Figures of a state, and those of its blocks."""
        params, data = state.params, self.data()
        quarters = [self.mean(self.slope(params, x) for x in data[i::4]) for i in range(4)]
        pairs = [(0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3)]  # halves that share nothing
        products = [np.asarray(self.dots(quarters[i], quarters[j]), np.float64) for i, j in pairs]
        leaves = self.pick(params)
        h = {n: state.rule.curvature[n] for n in leaves}
        traces, whitened, rng = [], [], jax.random.key(7)
        for i in range(self.probes):
            keys = dict(
                zip(leaves, jax.random.split(jax.random.fold_in(rng, i), len(leaves)), strict=True)
            )
            v = {n: jax.random.rademacher(keys[n], x.shape, x.dtype) for n, x in leaves.items()}
            traces.append(self.dots(v, self.along(params, v, data[i % len(data)])))
            white = {n: x / jnp.sqrt(h[n]) for n, x in v.items()}
            if int(state.round):
                whitened.append(self.dots(white, self.along(params, white, data[i % len(data)])))
        trace = np.asarray(traces, np.float64)
        zeta = np.asarray(whitened, np.float64).sum(1).mean() if whitened else trace.sum(1).mean()
        v = quarters[0]
        largest = 0.0
        for _ in range(12):  # the power method, on a piece
            norm = jnp.sqrt(self.dots(v, v).sum())
            v = jax.tree.map(lambda x, n=norm: x / n, v)
            image = self.along(params, v, data[0])
            largest, v = float(self.dots(v, image).sum()), image
        noise, alone = self.rounds(params, 16)
        fit, judge = trace[::2].mean(0), trace[1::2].mean(0)
        scales = products[0].clip(0) / fit.clip(fit.sum() / len(fit) / 10)
        signal = np.mean(products, 0)
        figures = dict(
            round=int(state.round),
            loss=float(np.mean([self.loss(params, x) for x in data])),
            gradient=signal.sum(),
            batch_gradient=noise.sum(),
            client_gradient=alone.sum(),
            trace=trace.sum(1).mean(),
            trace_error=trace.sum(1).std() / np.sqrt(len(trace)),
            largest=largest,
            kappa=trace.sum(1).mean() / largest,
            zeta=zeta,
            gain_own=self.options.clients_per_round * noise.sum() / alone.sum(),
            gain_blocks=gain(scales, products[1], noise, judge),
        )
        blocks = dict(signal=signal, noise=noise, alone=alone, trace=trace.mean(0))
        return {k: v if isinstance(v, int) else float(v) for k, v in figures.items()}, blocks


def main(options: Blocks) -> None:
    """Train, look, print and write."""
    first = {n: v[0] for n, v in compare.varied(finetune.Options, options.vary).items()}
    settings = dataclasses.replace(
        compare.defaults(options.task, options.data, options.columns), **first
    )
    problem = compare.build(options.task, settings)
    alg = hj.federated_hiso(
        problem.loss_fn, options.learning_rate, num_perturbations=settings.num_perturbations,
        distribution=settings.distribution, lazy=problem.lazy, trainable=problem.trainable,
    )  # fmt: skip
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(0))
    look = Look(problem, settings, options.examples, options.probes, options.piece)
    leaves = look.pick(state.params)
    names, tables = block_names(leaves), []
    parts = parts_of(leaves, problem.upper(1).leaves if problem.upper else ())
    cost = functools.cache(functools.partial(methods.share, problem))
    rows, kept = [], []

    def note(state: hj.State) -> None:
        figures, blocks = look(state)
        rows.append(figures)
        tables.append(by_layer(parts, blocks, cost))
        columns = zip(*blocks.values(), strict=True)
        each = {n: [float(x) for x in own] for n, own in zip(names, columns, strict=True)}
        kept.append(figures | {"blocks": each})
        # After every look, since each takes minutes.
        with files.atomic_write(options.out) as part:
            part.write_text(report.dumps(kept, 1) + "\n")
        report.console.print({k: round(v, 4) for k, v in figures.items()})

    if 0 in options.rounds:
        note(state)
    last = max(options.rounds)
    rounds = dataclasses.replace(settings, rounds=last)
    for step in job.rounds(rounds, problem, alg, state) if last else ():
        if step.round in options.rounds:
            note(step.state)
    show_figures(rows)
    for row, table in zip(rows, tables, strict=True):
        report.console.print(f"Round {row['round']}, by layer:")
        results.show(*table)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Blocks))
