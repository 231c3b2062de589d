"""Curvature of any granularity, made of the same scalars: a number a block, a matrix a side.

Rules between `hiso_jax.rules.rms`, one number for all of a model, and `hiso_jax.rules.hiso`, one
for every element. They are methods of the jobs:

    hiso digits --method "experiments.granularity:blocks(each=layer)" --learning-rate 2e-2
    hiso compare --grid experiments/grids/granularity_digits.toml

What differs is H alone, an average of squares of the reconstructed ascent direction Delta:

* `blocks`: the mean square over a block. ``each="layer"``: all that a layer has, over its leaves;
  ``"leaf"``: a layer's part of a leaf; ``"model"``: everything.
* `kronecker`: ``L x R / tr L`` for every matrix G of Delta, with L an average of G G' and R one of
  G' G: their second moment itself, if that is a Kronecker product at all. Being HiSo's H and no
  root of it, it has HiSo's powers, and not the fourth roots of Shampoo (arXiv 1802.09568), which
  stand for the root of H. A side longer than `LONGEST` has no matrix; vectors have HiSo's diagonal.

And each goes where a curvature can go:

* ``where="noise"``: HiSo, ``z = H^-1/2 u``, the step Delta, H from 1 on by Delta of the round's
  last local step;
* ``where="step"``: as `rms` and RMSProp, noise and scalars as they are, the step ``H^-1/2 Delta``
  with H the average of P Delta^2, free of its start at zero. The factor P makes it `rms`, with its
  learning rates, but for what Delta says of a block.

These rules look at whole leaves. `blocks` adds up in an order of its own and reaches the same bits
everywhere; `kronecker` computes with the machine's own products and eigenvectors and does so on one
machine only, so no ledger of it is for others.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax._engine import checks, exact, trees
from hiso_jax._engine.trees import Leaves
from hiso_jax.models import subsets
from hiso_jax.protocol import Options
from hiso_jax.train import report as reports
from hiso_jax.train import results
from hiso_jax.train.digits import digits

LONGEST = 1024
"""Rows or columns of the largest matrix whose roots are taken."""
FLOOR = 1e-6
"""Of eigenvalues, relative to their mean: below it there is rounding only."""
SMALLEST = 2.0**-60
"""Of what has a root."""
WHERE, EACH = ("noise", "step"), ("layer", "leaf", "model")
DECAYS = {"noise": 0.95, "step": 0.99}
"""Those of HiSo and of `rms`."""


class Curvature(NamedTuple):
    """An H of some granularity.

    Attributes:
      start: (leaves, H of every element) -> state.
      add: (state, leaves x, decay, epsilon) -> state with the squares of x averaged in.
      whiten: (state, leaves x, weight) -> (H / weight)^-1/2 x.
    """

    start: Callable[[Leaves, float], Any]
    add: Callable[[Any, Leaves, float, float], Any]
    whiten: Callable[[Any, Leaves, Any], Leaves]


class Learned(NamedTuple):
    """State of a rule: H, and the weight of what it has seen, 1 - decay^steps."""

    curvature: Any
    weight: jax.Array


def rule(kind: Curvature, where: str, decay: float | None, epsilon: float, **config: Any) -> Any:
    """The `hiso_jax.rules.Rule` of a curvature; see the module's docstring.

    Args:
      kind: of curvature.
      where: it goes, ``"noise"`` or ``"step"``.
      decay: weight of the old H, in [0, 1]; by default of `DECAYS`.
      epsilon: floor of H, >= 0.
      **config: names the rule.
    """
    checks.choice("where", where, WHERE)
    old = DECAYS[where] if decay is None else decay
    checks.number("decay", old, 0, 1)
    checks.number("epsilon", epsilon, 0)
    one = lambda: jnp.ones((), jnp.float32)  # noqa: E731

    def of_noise(state: Learned, delta: Leaves, scalars: Any, last: Any) -> tuple[Leaves, Learned]:
        del scalars
        new = kind.add(state.curvature, delta, old, epsilon)
        keep = lambda new, old: jnp.where(last, new, old)  # noqa: E731
        return delta, state._replace(curvature=jax.tree.map(keep, new, state.curvature))

    def of_step(state: Learned, delta: Leaves, scalars: Any, last: Any) -> tuple[Leaves, Learned]:
        del last
        root = len(scalars) ** 0.5
        scaled = {n: exact.mul(root, d) for n, d in delta.items()}
        new = kind.add(state.curvature, scaled, old, 0.0)
        weight = exact.mul(old, state.weight) + exact.mul(1 - old, 1.0)
        return kind.whiten(new, delta, weight), Learned(new, weight)

    inside = where == "noise"
    return hj.rules.Rule(
        init=lambda leaves: Learned(kind.start(leaves, float(inside)), one() * inside),
        direction=lambda state, u: kind.whiten(state.curvature, u, 1.0) if inside else u,
        update=of_noise if inside else of_step,
        config=config | dict(where=where, decay=old, epsilon=epsilon),
        carried=not inside,
        elementwise=False,
    )


# One number a block.


def block_names(leaves: Leaves, each: str) -> dict[str, list[str]]:
    """Names of the blocks that a leaf has a part of: of its layers, or of all of it.

    Example:
      >>> leaves = {"bert/layer/fc/kernel": np.ones((2, 3, 3)), "head/bias": np.ones(3)}
      >>> block_names(leaves, "layer")
      {'bert/layer/fc/kernel': ['layer 0', 'layer 1'], 'head/bias': ['head']}
    """

    def names(name: str, x: Any) -> list[str]:
        if each == "model":
            return [""]
        if subsets.stacked(name):
            return [f"{name if each == 'leaf' else 'layer'} {i}" for i in range(len(x))]
        return [(name.rpartition("/")[0] if each == "layer" else "") or name]

    return {name: names(name, x) for name, x in leaves.items()}


def total(x: jax.Array) -> jax.Array:
    """Sums of the rows of [R, N], in an order that is the same in every program.

    Example:
      >>> total(jnp.ones((2, 5000))).tolist()
      [5000.0, 5000.0]
    """
    for lanes in (4096, 64, 1):
        rows = -(-x.shape[1] // lanes)
        parts = jnp.pad(x, ((0, 0), (0, rows * lanes - x.shape[1]))).reshape(-1, rows, lanes)
        add = lambda i, sum, parts=parts: sum + lax.dynamic_index_in_dim(parts, i, 1, False)  # noqa: E731
        x = lax.fori_loop(0, rows, add, jnp.zeros((len(x), lanes), jnp.float32))
    return x[:, 0]


def _numbers(each: str) -> Curvature:
    def plan(leaves: Leaves) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Numbers of the blocks of each leaf, and how many elements a block has."""
        names = block_names(leaves, each)
        known = list(dict.fromkeys(name for own in names.values() for name in own))
        numbers = {n: np.array([known.index(name) for name in own]) for n, own in names.items()}
        sizes = np.zeros(len(known))
        for name, own in numbers.items():
            sizes[own] += math.prod(leaves[name].shape) / len(own)
        return numbers, sizes

    def start(leaves: Leaves, value: float) -> jax.Array:
        return jnp.full(len(plan(leaves)[1]), value, jnp.float32)

    def add(h: jax.Array, leaves: Leaves, decay: float, epsilon: float) -> jax.Array:
        numbers, sizes = plan(leaves)
        sums = jnp.zeros_like(h)
        for name, own in numbers.items():
            rows = leaves[name].reshape(len(own), -1)
            sums = sums.at[own].add(total(exact.mul(rows, rows)), unique_indices=True)
        mean = exact.mul(sums, (1 / np.maximum(sizes, 1)).astype(np.float32))
        return exact.flush_subnormals(exact.mul(decay, h) + exact.mul(1 - decay, mean + epsilon))

    def whiten(h: jax.Array, leaves: Leaves, weight: Any) -> Leaves:
        free = exact.mul(h, exact.reciprocal(jnp.maximum(weight, SMALLEST)))
        roots = exact.rsqrt(jnp.maximum(free, SMALLEST))
        shape = lambda x, own: (len(own),) + (1,) * (x.ndim - 1) if len(own) > 1 else ()  # noqa: E731
        return {n: exact.mul(roots[own].reshape(shape(leaves[n], own)), leaves[n])
                for n, own in plan(leaves)[0].items()}  # fmt: skip

    return Curvature(start, add, whiten)


# Matrices.


class Side(NamedTuple):
    """Matrices [B, n, n] of a leaf's left or right side, and their roots."""

    mean: jax.Array
    root: jax.Array  # mean^-1/2


class Factors(NamedTuple):
    """Of one leaf: its averages of G G' and G' G, those there are; or of G^2."""

    left: Side | None = None
    right: Side | None = None
    squares: jax.Array | None = None


def matrices(name: str, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Shape [B, m, n] of the matrices that a leaf is seen as, of a layer each; None for vectors.

    Example:
      >>> matrices("first/kernel", (3, 3, 8, 16)), matrices("bert/layer/fc/bias", (6, 384))
      ((1, 72, 16), None)
    """
    batch, inner = (shape[0], shape[1:]) if subsets.stacked(name) else (1, shape)
    if len(inner) < 2 or min(rows := math.prod(inner[:-1]), inner[-1]) > LONGEST:
        return None
    return batch, rows, inner[-1]


def inverse_root(a: jax.Array) -> jax.Array:
    """A^-1/2 of symmetric matrices [B, n, n], of eigenvalues at least `FLOOR` of their mean."""
    values, vectors = jnp.linalg.eigh(a)
    least = jnp.maximum(FLOOR * values.mean(-1, keepdims=True), SMALLEST)
    scaled = vectors * lax.rsqrt(jnp.maximum(values, least))[:, None]
    return jnp.matmul(scaled, jnp.swapaxes(vectors, -1, -2), precision="highest")


def _as_matrices(leaves: Leaves) -> Leaves:
    return {n: x.reshape(matrices(n, x.shape) or x.shape) for n, x in leaves.items()}


def _matrices() -> Curvature:
    def start(leaves: Leaves, value: float) -> dict[str, Factors]:
        def one(name: str, x: Any) -> Factors:
            shape = matrices(name, x.shape)
            if shape is None:
                return Factors(squares=jnp.full(x.shape, value, jnp.float32))
            batch, m, n = shape

            def side(size: int, other: int) -> Side | None:
                if size > LONGEST:
                    return None
                unit = jnp.tile(jnp.eye(size, dtype=jnp.float32), (batch, 1, 1))
                return Side(value * other * unit, other**-0.5 * unit)

            return Factors(side(m, n), side(n, m))

        return {name: one(name, x) for name, x in leaves.items()}

    def add(state: Any, leaves: Leaves, decay: float, epsilon: float) -> dict[str, Factors]:
        average = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731

        def side(old: Side | None, g: jax.Array) -> Side | None:
            if old is None:
                return None
            new = jnp.matmul(g, jnp.swapaxes(g, 1, 2), precision="highest")
            mean = average(old.mean, new + epsilon * g.shape[2] * jnp.eye(g.shape[1])[None])
            return Side(mean, inverse_root(mean))

        def one(own: Factors, g: jax.Array) -> Factors:
            if own.squares is not None:
                return Factors(squares=average(own.squares, g * g + epsilon))
            return Factors(side(own.left, g), side(own.right, jnp.swapaxes(g, 1, 2)))

        # Each by itself, so that they round alike in every program of the machine.
        return {n: exact.compiled_alone(one, state[n], g) for n, g in _as_matrices(leaves).items()}

    def whiten(state: Any, leaves: Leaves, weight: Any) -> Leaves:
        def one(own: Factors, g: jax.Array, weight: jax.Array) -> jax.Array:
            if own.squares is not None:
                return g * lax.rsqrt(jnp.maximum(own.squares / weight, SMALLEST))
            # H = L x R / tr L, where there are both; else the mean of one over the other side.
            scale = jnp.float32(g.shape[1] if own.left is None else g.shape[2])
            if own.left is not None and own.right is not None:
                scale = jnp.trace(own.left.mean, axis1=1, axis2=2)[:, None, None]
            if own.left is not None:
                g = jnp.matmul(own.left.root, g, precision="highest")
            if own.right is not None:
                g = jnp.matmul(g, own.right.root, precision="highest")
            return g * jnp.sqrt(scale * weight)

        weight = jnp.maximum(jnp.asarray(weight, jnp.float32), SMALLEST)
        found = _as_matrices(leaves)
        made = {n: exact.compiled_alone(one, state[n], g, weight) for n, g in found.items()}
        return {n: x.reshape(leaves[n].shape) for n, x in made.items()}

    return Curvature(start, add, whiten)


# The methods.


def block_rule(
    each: str = "layer", where: str = "noise", decay: float | None = None, epsilon: float = 1e-8
) -> hj.rules.Rule:
    """One number a block; see the module's docstring."""
    kind = _numbers(checks.choice("each", each, EACH))
    return rule(kind, where, decay, epsilon, rule="granularity:blocks", each=each)


def kronecker_rule(
    where: str = "noise", decay: float | None = None, epsilon: float = 1e-8
) -> hj.rules.Rule:
    """Two matrices a matrix; see the module's docstring."""
    return rule(_matrices(), where, decay, epsilon, rule="granularity:kronecker")


def blocks(
    loss_fn: Any, learning_rate: optax.ScalarOrSchedule, *, each: str = "layer",
    where: str = "noise", decay: float | None = None, **options: Unpack[Options],
) -> hj.Algorithm:  # fmt: skip
    """A method of `block_rule`, for ``--method "experiments.granularity:blocks(each=leaf)"``."""
    own = block_rule(each, where, decay)
    return hj.scalar_algorithm(loss_fn, learning_rate, rule=own, **options)


def kronecker(
    loss_fn: Any, learning_rate: optax.ScalarOrSchedule, *, where: str = "noise",
    decay: float | None = None, **options: Unpack[Options],
) -> hj.Algorithm:  # fmt: skip
    """A method of `kronecker_rule`."""
    own = kronecker_rule(where, decay)
    return hj.scalar_algorithm(loss_fn, learning_rate, rule=own, **options)


# What a number of a block can know.


@dataclasses.dataclass(frozen=True)
class Look:
    """Train the digits' network with a number a block, and look at what the numbers became."""

    each: str = "leaf"
    """What a block is: layer or leaf."""
    rounds: int = 300
    """Before the look."""
    learning_rate: float = 0.064
    """Constant."""
    num_perturbations: int = 10
    """Scalars a round (P)."""
    seed: int = 0
    """Of noise and clients."""


def look(options: Look) -> list[list[str]]:
    """Lines of a table of the blocks, header first.

    With signs for noise, the mean square of P^1/2 Delta over a block of n elements is in the mean
    ``|a|^2 + (P - 1) |a of the block|^2 / n``, with a the gradient of the round's batches: the
    second term is all that a block has of its own.
    """
    problem, p = digits(), options.num_perturbations
    alg = blocks(problem.loss_fn, options.learning_rate, each=options.each, where="step",
                 num_perturbations=p, distribution="rademacher")  # fmt: skip
    start = state = alg.init(problem.params, jax.random.key(options.seed))
    how: Any = dict(rounds=options.rounds, clients_per_round=8, batch_size=16, seed=options.seed)
    for report in federation.run(alg, start, problem.clients, **how):
        state = report.state
    kind, names = _numbers(options.each), block_names(trees.named(state.params), options.each)

    @jax.jit
    def of_round(batches: Any) -> jax.Array:  # `blocks` of the gradient, not of Delta
        loss = lambda x: jax.vmap(lambda one: problem.loss_fn(x, one))(batches).mean()  # noqa: E731
        gradient = trees.named(jax.grad(loss)(state.params))
        return kind.add(kind.start(gradient, 0.0), gradient, 0.0, 0.0)

    each = []
    for number in range(10_000, 10_050):
        asked = problem.clients.sample(8, number, options.seed)
        own = problem.clients.batches(asked, number, 16, 1, options.seed)
        each.append(np.asarray(of_round({k: jnp.asarray(v[:, 0]) for k, v in own.items()}), float))
    squares, found = np.mean(each, 0), np.asarray(state.rule.curvature, float)
    sizes = dict.fromkeys((name for own in names.values() for name in own), 0)
    for leaf, own in names.items():
        for name in own:
            sizes[name] += trees.named(state.params)[leaf].size // len(own)
    n = np.array(list(sizes.values()))
    columns = (squares, n @ squares + (p - 1) * squares, found)
    shown = np.stack([x / (n @ x) * n.sum() for x in columns], 1)
    lines = [[name, f"{size:,}", *(f"{x:.2f}" for x in row)]
             for name, size, row in zip(sizes, n, shown, strict=True)]  # fmt: skip
    return [["block", "elements", "gradient squared an element, over the mean",
             "H over the mean, expected", "found"], *lines]  # fmt: skip


if __name__ == "__main__":
    import tyro

    with reports.door():
        header, *rows = look(tyro.cli(Look))
        results.show(header, rows)
