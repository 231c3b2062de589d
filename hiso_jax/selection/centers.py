"""Examples like points that are optimized among the features: ActiveFT and VeCAF."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from hiso_jax._engine import checks
from hiso_jax.selection.cover import nearest
from hiso_jax.selection.draws import checked, generator, positive

TEMPERATURE = 0.07
"""tau of ActiveFT's published code."""
LEARNING_RATE = 1e-3
"""Of Adam on the centroids, as there."""
STEPS = 300
"""Of Adam, as there for CIFAR."""
LOWEST = 1e-4
"""Weights of examples are at least this much of the mean one, as in VeCAF's published code."""
Objective = Literal["weighted", "published"]
"""Of `vecaf`: the weight stands before an example's term, or inside of its logarithm."""


def unit(features: np.ndarray) -> np.ndarray:
    """Features scaled to length 1; those of length 0 stay."""
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(length > 0, length, 1)


def objective(
    centers: jax.Array,
    features: jax.Array,
    weights: jax.Array,
    there: jax.Array,
    temperature: float = TEMPERATURE,
    balance: float = 1.0,
    kind: Objective = "weighted",
) -> jax.Array:
    """What `active_ft` and `vecaf` minimize: every example near a center, and centers apart.

    With s_ik the cosine of example i and center k, k(i) the nearest center and sg a stopped
    gradient,

    ``J = sum_i p_i softplus(log(balance R_k(i)) - s_i,k(i) / tau)``,
    ``R_k = sum_k' exp(sg(c_k') c_k / tau)``,

    which is -log of the softmax of an example's nearest center against the other centers.

    Args:
      centers: [B, D], none of length 0, which has no direction.
      features: [N, D], of length 1 or 0.
      weights: [N]; p is in proportion to them. 0 for rows that only fill up.
      there: [B], whether a center is one, or only fills up.
      temperature: tau.
      balance: of what drives centers apart.
      kind: ``"published"`` has p alike and subtracts log(weights) inside of the softplus, as the
        published code of VeCAF does: a larger weight pulls centers less.
    """
    c = centers / jnp.linalg.norm(centers, axis=1, keepdims=True)
    like = jnp.where(there, features @ c.T / temperature, -jnp.inf)
    between = lax.stop_gradient(c) @ c.T / temperature  # [k', k]
    apart = jax.nn.logsumexp(jnp.where(there[:, None], between, -jnp.inf), axis=0)
    near = jnp.argmax(like, 1)
    best = jnp.take_along_axis(like, near[:, None], 1)[:, 0]
    inside = 0.0
    if kind == "published":
        inside = jnp.log(jnp.where(weights > 0, weights, 1))
        weights = (weights > 0).astype(weights.dtype)
    each = jax.nn.softplus(jnp.log(balance) + apart[near] - best - inside)
    return (weights / weights.sum() * each).sum()


@functools.partial(jax.jit, static_argnames=("steps", "kind"))
def _optimize(
    starts: jax.Array,
    features: jax.Array,
    weights: jax.Array,
    there: jax.Array,
    numbers: tuple[float, float, float],
    steps: int,
    kind: Objective,
) -> jax.Array:
    """Adam from each of some starts [S, B, D]; `numbers` are temperature, balance and rate."""
    temperature, balance, rate = numbers
    adam = optax.adam(rate)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        centers, memory = carry
        slope = jax.grad(objective)(centers, features, weights, there, temperature, balance, kind)
        updates, memory = adam.update(slope, memory)
        return (optax.apply_updates(centers, updates), memory), None

    def one(start: jax.Array) -> jax.Array:
        return lax.scan(step, (start, adam.init(start)), None, length=steps)[0][0]

    return lax.map(one, starts)


def _room(count: int, least: int) -> int:
    """A power of two that holds so many, so that few programs are compiled."""
    return max(least, 1 << (count - 1).bit_length())


def centroids(
    features: np.ndarray,
    begin: np.ndarray,
    weights: np.ndarray,
    *,
    kind: Objective = "weighted",
    temperature: float = TEMPERATURE,
    balance: float = 1.0,
    learning_rate: float = LEARNING_RATE,
    steps: int = STEPS,
) -> np.ndarray:
    """Minimize `objective` by Adam, from each of some starts.

    Args:
      features: [N, D], of length 1 or 0.
      begin: [S, B, D], where centers start; those of length 0 start along the first axis.
      weights: [N].
      kind, temperature, balance: of `objective`.
      learning_rate, steps: of Adam.

    Returns:
      Centers [S, B, D], float32, not scaled.

    Raises:
      ValueError: a center left the finite numbers.
    """
    for name, value in (("temperature", temperature), ("balance", balance)):
        checks.number(name, value, 0, above=True)
    checks.number("learning_rate", learning_rate, 0)
    checks.count("steps", steps)
    checks.choice("objective", kind, ("weighted", "published"))
    more, others = _room(len(features), 64) - len(features), begin.shape[1]
    extra = _room(others, 8) - others
    x = np.pad(np.asarray(features, np.float32), [(0, more), (0, 0)])
    first = np.pad(np.asarray(begin, np.float32), [(0, 0), (0, extra), (0, 0)])
    # Of length 1, for there is no direction of zeros; so what fills up, too.
    first[np.linalg.norm(first, axis=-1) == 0, 0] = 1
    found = _optimize(
        first, x, np.pad(weights, (0, more)).astype(np.float32), np.arange(others + extra) < others,
        (temperature, balance, learning_rate), steps, kind,
    )  # fmt: skip
    centers = np.asarray(found)[:, :others]
    if not np.isfinite(centers).all():
        raise ValueError(f"learning_rate: {learning_rate:g} and temperature {temperature:g} take "
                         "centers out of the finite numbers")  # fmt: skip
    return centers


def active_ft(
    features: Any, budget: int, key: jax.Array, weights: None = None, **options: Any
) -> np.ndarray:
    """ActiveFT (Xie et al., CVPR 2023, arXiv 2303.14382): centers like the pool, and apart.

    Args:
      features: [N, D]; their directions count.
      budget: B.
      key: of the examples that centers begin as.
      weights: none; those are what `vecaf` adds.
      **options: ``temperature``, ``balance``, ``learning_rate`` and ``steps`` of `centroids`.

    Example:
      >>> x = np.repeat(np.eye(3), 5, 0)
      >>> len(set((active_ft(x, 3, jax.random.key(1), steps=5) // 5).tolist())) > 1
      True
    """
    features, _ = checked(features, budget, weights)
    x, own = unit(features), np.ones(len(features))
    centers = centroids(x, starts(x, own, budget, key), own, **options)[0]
    return nearest(x @ unit(centers).T)


def starts(
    features: np.ndarray, weights: np.ndarray, budget: int, key: jax.Array, count: int = 1
) -> np.ndarray:
    """Draw features [count, B, D] to begin at, in proportion to weights > 0, without repetition.

    A center moves with the examples that it is nearest to, so it stays in the part of the pool
    that it begins in: what weights are to change must be in the draw. Features of length 0, which
    have no direction, are in it only if there are too few others.
    """
    pointing = np.linalg.norm(features, axis=1) > 0
    if np.count_nonzero(pointing) >= budget:
        weights = weights * pointing
    rng, chances = generator(key), weights / weights.sum()
    draws = [rng.choice(len(features), budget, False, chances) for _ in range(count)]
    return features[np.array(draws)]


def vecaf(
    features: Any,
    budget: int,
    key: jax.Array,
    weights: Any = None,
    *,
    objective: Objective = "weighted",
    ensemble: int = 1,
    **options: Any,
) -> np.ndarray:
    """VeCAF (arXiv 2401.07853): `active_ft` in which examples count by their loss.

    The paper's p_L, in proportion to losses, is before each term of the objective. Centers begin
    as a draw from it; how the authors begin is not said.

    Args:
      features: [N, D]; their directions count.
      budget: B.
      key: of the examples that centers begin as.
      weights: >= 0, losses of the model at hand.
      objective: see the function of that name; ``"published"`` is only there to be compared with.
      ensemble: how many sets of centers are optimized from starts of their own; of more than one,
        `joined` makes one.
      **options: ``temperature``, ``balance``, ``learning_rate`` and ``steps`` of `centroids`.

    Example:
      >>> losses = [0.1] * 8 + [9.0] * 2
      >>> x = np.random.default_rng(0).normal(size=(10, 4))
      >>> vecaf(x, 3, jax.random.key(0), losses, ensemble=3, steps=5).shape
      (3,)
    """
    features, weights = checked(features, budget, weights, "a loss for each example")
    checks.count("ensemble", ensemble)
    own = np.maximum(positive(weights, len(features)), LOWEST)
    x = unit(features)
    begin = starts(x, own, budget, key, ensemble)
    centers = joined(centroids(x, begin, own, kind=objective, **options))
    return nearest(x @ unit(centers).T)


def joined(centers: np.ndarray) -> np.ndarray:
    """One set of centers of an ensemble's, as VeCAF's published code makes it.

    ``g + (g - m) * ((g - m) S^+)`` with m the mean of all but the first set, ``S = E[C' C] - m' m``
    over these and g the second set; of one set, that set, and of two, the second.

    Args:
      centers: [S, B, D].

    Example:
      >>> joined(np.stack([np.zeros((2, 3)), np.ones((2, 3))])).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if len(centers) == 1:
        return centers[0]
    own = np.asarray(centers[1:], np.float64)
    mean, first = own.mean(0), own[0]
    spread = np.einsum("sbd,sbe->de", own, own) / len(own) - mean.T @ mean
    away = first - mean
    return first + away * (away @ np.linalg.pinv(spread, hermitian=True))
