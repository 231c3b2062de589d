"""Directions that move the upper part of a model only, and so start from kept activations.

A pass through the whole model is needed once: its activations below the upper part serve
every direction that leaves the lower part as it is. Such a direction costs a client the
upper part's share of a pass, and the upper part gets more of the noise, which is where the
ratio of squared gradient to curvature is often largest.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from hiso_jax import estimators
from hiso_jax._engine import still, trees
from hiso_jax._engine.shapes import Array, Float, Number

Kept = Any
"""What a trunk gives: any pytree of arrays."""
Trunk = Callable[[trees.Params, trees.Batch], Kept]
Head = Callable[[trees.Params, Kept], Float[Array, ""]]


class Split(NamedTuple):
    """Where a model is cut, and how many directions of a local step move what is above.

    For parameters that differ from `params` above the cut only, the loss of a batch is
    ``head(other, trunk(params, batch))``.

    Attributes:
      trunk: ``(params, batch) -> kept``, the same for all such parameters: the activations at the
        cut, and what else `head` needs of the batch.
      head: ``(params, kept) -> loss``, the rest of the way.
      leaves: name of a leaf (see `hiso_jax.trees`) -> its first row, along the first axis, that
        lies above the cut: 0 for a whole leaf, 4 for the last two of six stacked layers. Leaves
        that are not named lie below.
      directions: how many of the P of a local step move these leaves only.
      between: ``(params, kept) -> kept``, from what the split before it kept, where there are
        several; by default the trunk starts from the batch again.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> trunk = lambda params, x: jnp.tanh(x @ params["w"])
      >>> head = lambda params, h: ((h @ params["v"] - 1) ** 2).mean()
      >>> loss_fn = lambda params, x: head(params, trunk(params, x))
      >>> params = {"w": jnp.ones((3, 4)), "v": jnp.zeros(4)}
      >>> upper = Split(trunk, head, {"v": 0}, directions=4)  # one direction moves all, four only v
      >>> alg = hj.decomfl(loss_fn, 0.1, num_perturbations=5, upper=upper)
      >>> state = alg.init(params, jax.random.key(0))
      >>> state, metrics = jax.jit(alg.round)(state, jnp.ones((2, 1, 8, 3)))
      >>> metrics.scalars.shape
      (2, 1, 5)
    """

    trunk: Trunk
    head: Head | None  # None: the loss itself takes what the trunk gives
    leaves: Mapping[str, int]
    directions: int
    between: Callable[[trees.Params, Kept], Kept] | None = None


def Upper(features: Trunk, leaves: Mapping[str, int], directions: int) -> Split:
    """A `Split` whose loss goes on from what `features` gives. Deprecated: use `Split`."""
    warnings.warn("hj.Upper: use hj.Split(trunk, head, leaves, directions)", DeprecationWarning, 2)
    return Split(features, None, leaves, directions)


def of(upper: Split | Sequence[Split], perturbations: int) -> tuple[Split, ...]:
    """Return one split or several as a tuple, from the deepest cut to the highest.

    Raises:
      TypeError, ValueError: one is none, or they have more directions than P.
    """
    splits = (upper,) if isinstance(upper, Split) else tuple(upper)
    for split in splits:
        if not isinstance(split, Split) or not callable(split.trunk):
            raise TypeError(f"upper: expected a Split whose trunk is a function, got {split!r}")
        still.check_part(split, perturbations)
    counts = [split.directions for split in splits]
    if not counts or sum(counts) > perturbations:
        raise ValueError(f"upper: directions are at most num_perturbations={perturbations} "
                         f"together, got {counts}")  # fmt: skip
    return splits


def what_moves(splits: Sequence[Split]) -> still.Still:
    """What stays still along the directions of the splits."""
    return still.Still(tuple(still.Part(split.leaves, split.directions) for split in splits))


def estimator(
    splits: Sequence[Split], num_perturbations: int, smoothing: Number
) -> estimators.Estimator:
    """Forward differences of which the last ones start from kept activations.

    Args:
      splits: in the order of their directions, which are the last of P.
      num_perturbations: P.
      smoothing: finite-difference step mu > 0.
    """
    wholes = num_perturbations - sum(split.directions for split in splits)
    forward = estimators.forward_difference

    def scalars(
        loss_fn: estimators.LossFn,
        params: trees.Params,
        batch: trees.Batch,
        direction: estimators.Direction,
    ) -> estimators.Measured:
        found, value, kept, first = [], None, None, wholes
        for split in splits:
            head = split.head or loss_fn
            if found and split.between is not None:
                kept = split.between(params, kept)
            else:
                kept = split.trunk(params, batch)
            loss = lambda x, head=head, kept=kept: jnp.asarray(head(x, kept))  # noqa: E731
            above = lambda p, first=first: direction(first + p)  # noqa: E731
            value, top = forward(loss, params, above, split.directions, smoothing, base=value)
            found.append(top)
            first += split.directions
        if wholes:
            loss = lambda x: jnp.asarray(loss_fn(x, batch))  # noqa: E731
            found.insert(0, forward(loss, params, direction, wholes, smoothing, base=value)[1])
        assert value is not None
        return value, jnp.concatenate(found) if len(found) > 1 else found[0]

    return estimators.Estimator(scalars, 1, {"estimator": "forward", "smoothing": smoothing})
