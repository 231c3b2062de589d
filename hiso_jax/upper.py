"""Directions that move the upper part of a model only, and so start from kept activations.

A pass through the whole model is needed once: its activations below the upper part serve
every direction that leaves the lower part as it is. Such a direction costs a client the
upper part's share of a pass, and the upper part gets more of the noise, which is where the
ratio of squared gradient to curvature is often largest.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax import checks, packing, trees


class Upper(NamedTuple):
    """How many directions of a local step move the upper part only, and what that is.

    The loss must start from where it is told to: for parameters that differ from `params` in
    the upper part only, ``loss_fn(other, features(params, batch)) == loss_fn(other, batch)``.

    Attributes:
      features: ``(params, batch) -> batch``, the same for all such parameters: what `loss_fn`
        takes in the place of the batch to go on from, usually the batch with activations in it.
      leaves: name of a leaf (see `hiso_jax.trees`) -> its first row, along the first axis, that
        is part of the upper part: 0 for a whole leaf, 4 for the last two of six stacked layers.
        Leaves that are not named belong to the lower part.
      directions: of the P of a local step the last so many, 1 to P. With all of them the
        lower part stays as it is.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> lower = lambda params, x: {"h": jnp.tanh(x @ params["w"])}
      >>> def loss_fn(params, batch):
      ...     kept = batch if isinstance(batch, dict) else lower(params, batch)
      ...     return ((kept["h"] @ params["v"] - 1) ** 2).mean()
      >>> params = {"w": jnp.ones((3, 4)), "v": jnp.zeros(4)}
      >>> upper = Upper(lower, {"v": 0}, directions=4)  # one direction moves all, four only v
      >>> alg = hj.decomfl(loss_fn, 0.1, num_perturbations=5, upper=upper)
      >>> state = alg.init(params, jax.random.key(0))
      >>> state, metrics = jax.jit(alg.round)(state, jnp.ones((2, 1, 8, 3)))
      >>> metrics.scalars.shape
      (2, 1, 5)
    """

    features: Callable[[trees.Params, Any], Any]
    leaves: Mapping[str, int]
    directions: int


def check(upper: Upper, perturbations: int) -> None:
    """Raise TypeError or ValueError, by name, for an `Upper` that is not one."""
    if not callable(upper.features):
        raise TypeError(f"upper: features must be a function, got {upper.features!r}")
    if checks.count("upper: directions", upper.directions) > perturbations:
        raise ValueError(f"upper: directions are at most num_perturbations={perturbations}, got "
                         f"{upper.directions}")  # fmt: skip
    rows = upper.leaves.values()
    if not upper.leaves or not all(isinstance(row, int) and row >= 0 for row in rows):
        raise ValueError(f"upper: leaves must name leaves and rows >= 0, got {upper.leaves!r}")


def check_leaves(upper: Upper, leaves: trees.Leaves) -> None:
    """Raise ValueError unless the upper part is among the trainable leaves."""
    for name, row in upper.leaves.items():
        if name not in leaves:
            raise ValueError(f"upper: {name!r} is none of the trainable leaves {list(leaves)}")
        if row and row >= len(leaves[name]):
            raise ValueError(f"upper: {name!r} has {len(leaves[name])} rows, none from {row} on")


def recipe(upper: Upper) -> dict[str, Any]:
    """What a replay has to know, as data."""
    return {"leaves": dict(upper.leaves), "directions": upper.directions}


def first(leaves: Mapping[str, int], name: str, shape: tuple[int, ...]) -> int:
    """Number of the first element of a leaf that is part of the upper part."""
    row = leaves.get(name)
    if row is None:
        return math.prod(shape)
    return row * math.prod(shape[1:]) if row else 0


def only(
    drawn: jax.Array, whole: Any, start: Any, shape: tuple[int, ...], boundary: Any
) -> jax.Array:
    """Noise with zeros for the lower part, unless `whole`.

    Args:
      drawn: runs of noise, [*start.shape, *shape].
      whole: bool: the direction moves all.
      start: number of each run's first element.
      shape: of a run.
      boundary: number of the first element of the upper part.
    """
    start = jnp.asarray(start, jnp.uint32)
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(*[1] * start.ndim, *shape)
    place = start.reshape(*start.shape, *[1] * len(shape)) + index
    return jnp.where(whole | (place >= jnp.asarray(boundary, jnp.uint32)), drawn, 0)


def noise(
    drawn: Callable[..., jax.Array],
    upper: Mapping[str, Any],
    perturbations: int,
    shapes: Mapping[str, tuple[int, ...]],
    packs: packing.Packs,
) -> Callable[..., jax.Array]:
    """The `hiso_jax.updates.Noise` of which the last directions of a client are upper ones.

    Args:
      drawn: noise of leaves and packs.
      upper: a `recipe`.
      perturbations: P; direction number p is the p % P-th of a client.
      shapes: of the leaves.
      packs: from `hiso_jax.packing.plan`.
    """
    leaves, wholes = upper["leaves"], perturbations - upper["directions"]

    def one(name: str, k: Any, p: Any, shape: tuple[int, ...], start: Any) -> jax.Array:
        members = packs.get(name) or {name: shapes[name]}
        bounds = [(first(leaves, n, s), math.prod(s)) for n, s in members.items()]
        if not wholes and all(bound == size for bound, size in bounds):
            return jnp.zeros((*jnp.shape(start), *shape), jnp.float32)
        own, whole = drawn(name, k, p, shape, start), p % perturbations < wholes
        if name not in packs:
            return only(own, whole, start, shape, bounds[0][0])
        kept = [jnp.arange(size) >= bound for bound, size in bounds]
        return jnp.where(whole | jnp.concatenate(kept), own, 0)

    return one
