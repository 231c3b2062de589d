"""Many clients' scalars [C, K, P] in, one record [K, S] out: all that the server sees.

An aggregator is a pure function ``(scalars [C, K, P], weights [C]) -> record [K, S]``, where S is
P, and C P of `concatenate`. A client of weight 0 is absent: its scalars are finite but must not
matter. One of your own is such a function; a ledger needs its name: the function's own, or
``Aggregator(function, "name")``.
"""

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from hiso_jax import estimators
from hiso_jax._engine import checks
from hiso_jax._engine.shapes import Array, ArrayLike, Bool, Float, Real

Function = Callable[[Float[Array, "C K P"], Float[Array, "C"]], Float[Array, "K S"]]
"""(scalars, weights) -> record."""
Weights = Real[ArrayLike, "C"] | None
"""Of clients; None: all are 1."""


# No tuple, since jax.jit takes a weak reference to what it compiles, and a tuple has none.
@dataclasses.dataclass(frozen=True)
class Aggregator:
    """A function of scalars and weights, with a name.

    Attributes:
      function: ``(scalars [C, K, P], weights [C]) -> record [K, S]``.
      config: what a ledger writes down, ``"trimmed_mean(0.1)"``; None if it has no name.
    """

    function: Function
    config: str | None

    def __call__(
        self, scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K S"]:
        """The record."""
        return self.function(scalars, weights)


def named(aggregator: Aggregator | Function) -> Aggregator:
    """Return an aggregator as it is, a function under its own name."""
    if isinstance(aggregator, Aggregator):
        return aggregator
    if not callable(aggregator):
        raise TypeError(f"aggregator: expected a function (scalars, weights) -> record, got "
                        f"{aggregator!r}")  # fmt: skip
    return Aggregator(aggregator, estimators.called(aggregator))


def mean() -> Aggregator:
    """Weighted mean over the clients (HiSo and DeComFL use equal weights).

    Example:
      >>> import jax.numpy as jnp
      >>> scalars = jnp.array([1.0, 4.0]).reshape(2, 1, 1)
      >>> float(mean()(scalars, jnp.array([2.0, 1.0]))[0, 0])
      2.0
    """

    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K P"]:
        return jnp.einsum("c,ckp->kp", weights / weights.sum(), scalars)

    return Aggregator(aggregate, "mean()")


def concatenate(clients: int, outputs: int = 1) -> Aggregator:
    """For clients with directions of their own: every scalar is kept, the weight is in it.

    The record is [K, clients P]: client c's scalars times ``clients`` and its share of the weight,
    so that the mean over all directions is the weighted mean over clients; zero for those that
    are not there.

    Args:
      clients: C, clients asked in a round.
      outputs: scalars of a direction; second differences come after all first ones.

    Example:
      >>> import jax.numpy as jnp
      >>> scalars = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
      >>> concatenate(2)(scalars, jnp.array([1.0, 1.0])).tolist()
      [[1.0, 2.0, 3.0, 4.0]]
    """

    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K S"]:
        count, steps, width = scalars.shape
        if count > clients:
            raise ValueError(
                f"scalars: expected at most per_client_directions={clients} clients, got {count}"
            )
        shares = clients * weights / weights.sum()
        shared = jnp.pad(shares[:, None, None] * scalars, ((0, clients - count), (0, 0), (0, 0)))
        parts = shared.reshape(clients, steps, outputs, width // outputs)
        return jnp.moveaxis(parts, 0, 2).reshape(steps, clients * width)

    return Aggregator(aggregate, "side_by_side()")


def _sorted(
    scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
) -> tuple[Float[Array, "C K P"], Float[Array, "C K P"]]:
    """Sort each of the K x P columns over the clients; absent ones go last."""
    present = jnp.where(weights[:, None, None] > 0, scalars, jnp.inf)
    order = jnp.argsort(present, axis=0)
    values = jnp.take_along_axis(scalars, order, axis=0)
    return values, weights[order]


def median() -> Aggregator:
    """Weighted median of every scalar; with equal weights, the ordinary median."""

    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K P"]:
        # Of the largest weight: equal ones are then 1, whose sums are exact, and so are ties.
        values, sorted_weights = _sorted(scalars, weights / weights.max())
        below = jnp.cumsum(sorted_weights, axis=0)
        half = below[-1:] / 2
        low = jnp.argmax(below >= half, axis=0)
        # An exact tie lies between two clients: their midpoint.
        high = jnp.where(
            jnp.take_along_axis(below, low[None], 0)[0] == half[0],
            jnp.argmax(below > half, 0),
            low,
        )
        picked = jnp.take_along_axis(values, jnp.stack([low, high]), axis=0)
        return picked.mean(0)

    return Aggregator(aggregate, "median()")


def trimmed_mean(trim: float = 0.1) -> Aggregator:
    """Weighted mean of each scalar without its lowest and highest floor(trim * C) clients.

    Args:
      trim: fraction cut at each end, in [0, 0.5).
    """
    checks.number("trim", trim, 0, 0.5, below=True)
    # In floats, the product of 0.42 and 150 is below 63, and an attacker would stay in.
    exact = Fraction(str(trim))

    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K P"]:
        values, sorted_weights = _sorted(scalars, weights)
        present = (weights > 0).sum()
        cut = jnp.array([math.floor(exact * n) for n in range(len(scalars) + 1)])[present]
        rank = jnp.arange(scalars.shape[0])[:, None, None]
        inner = jnp.where((rank >= cut) & (rank < present - cut), sorted_weights, 0)
        return (inner / inner.sum(0, keepdims=True) * values).sum(0)

    return Aggregator(aggregate, f"trimmed_mean({trim})")


def krum(num_byzantine: int = 1, num_selected: int = 1) -> Aggregator:
    """Krum, or multi-Krum: the clients closest to their neighbors (Blanchard et al. 2017).

    A client's score is the sum of squared distances, over all its K x P scalars, to its
    C - num_byzantine - 2 nearest neighbors; the weighted mean of the `num_selected` lowest
    scores is returned.

    Args:
      num_byzantine: number of attackers to withstand, f >= 0; needs C >= 2 f + 3. If fewer than
        that have answered, the record is NaN and moves nothing: the attackers may be among them.
      num_selected: 1 is Krum, more is multi-Krum; at most C - f.
    """
    if num_byzantine != 0:
        checks.count("num_byzantine", num_byzantine)
    checks.count("num_selected", num_selected)

    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K P"]:
        clients = scalars.shape[0]
        needed = max(2 * num_byzantine + 3, num_byzantine + num_selected)
        if clients < needed:
            raise ValueError(
                f"krum: with num_byzantine={num_byzantine} and num_selected={num_selected} "
                f"it needs at least {needed} clients, got {clients}"
            )
        flat = scalars.reshape(clients, -1)
        squared = ((flat[:, None] - flat[None]) ** 2).sum(-1)
        absent = weights <= 0
        other = ~(jnp.eye(clients, dtype=bool) | absent[None])
        nearest = jnp.sort(jnp.where(other, squared, jnp.inf), axis=1)
        # Absent clients are nobody's neighbors, so fewer are counted.
        present = (~absent).sum()
        neighbors = jnp.maximum(present - num_byzantine - 2, 1)
        counted = jnp.arange(clients)[None] < neighbors
        score = jnp.where(absent, jnp.inf, jnp.where(counted, nearest, 0).sum(1))
        rank = jnp.argsort(jnp.argsort(score))
        chosen = jnp.where(rank < num_selected, weights, 0)
        picked = jnp.einsum("c,ckp->kp", chosen / chosen.sum(), scalars)
        return jnp.where(present >= needed, picked, jnp.nan)

    return Aggregator(aggregate, f"krum({num_byzantine}, {num_selected})")


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "mean": mean, "median": median, "trimmed_mean": trimmed_mean, "krum": krum,
}  # fmt: skip
"""By the name in a config."""


MOST = 1e12
"""Scalars beyond it count as infinite: no square of those that count, or of a step, is."""


def _finite(scalars: Float[ArrayLike, "C K P"]) -> Bool[Array, "C"]:
    """Whether all of a client's scalars are numbers of a size that can be averaged."""
    return (jnp.abs(jnp.asarray(scalars)) <= MOST).all((1, 2))


class Combine(NamedTuple):
    """What the server does with clients' scalars: who counts, and how they are put together.

    Attributes:
      aggregator: see this module.
      nonfinite: what a client with a NaN or infinite scalar does, ``"raise"`` or ``"exclude"``.
    """

    aggregator: Aggregator
    nonfinite: str = "raise"

    def __call__(
        self, scalars: Array, weights: Weights, sent: tuple[int, int]
    ) -> tuple[Float[Array, "K S"], Float[Array, "C"], Bool[Array, "C"]]:
        """Return record, effective weights [C] and finite [C] of scalars [C, *sent].

        Raises:
          ValueError: wrong shapes or weights; a client's NaN, by its number, where it is known.
        """
        if scalars.ndim != 3 or scalars.shape[1:] != sent:
            raise ValueError(f"scalars: expected shape [C, {sent[0]}, {sent[1]}] (clients, "
                             f"local steps, perturbations), got {scalars.shape}")  # fmt: skip
        weights = checks.weights(weights, scalars.shape[0])
        usual, counts = _finite(scalars), weights > 0
        if checks.is_concrete((scalars, weights)) and self.nonfinite == "raise":
            if bad := np.flatnonzero(~np.asarray(usual | ~counts)).tolist():
                raise ValueError(
                    f"scalars: clients {bad} (positions along the first axis) sent NaN or infinite "
                    f"scalars, or some beyond {MOST:g}; lower the learning rate, or leave them out "
                    'with nonfinite="exclude"'
                )
        weights = jnp.where(usual, weights, 0)
        scalars = jnp.where((weights > 0)[:, None, None], scalars, 0)
        # A record nobody may apply is NaN: `advance` then moves nothing.
        record = self.aggregator(scalars, weights)
        usable = (weights.sum() > 0) & jnp.isfinite(record).all()
        if self.nonfinite == "raise":
            usable &= (usual | ~counts).all()
        return jnp.where(usable, record, jnp.nan), weights, usual

    @property
    def config(self) -> dict[str, Any]:
        """As data."""
        return {"aggregator": self.aggregator.config, "nonfinite": self.nonfinite}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of `config`, which may hold more; an aggregator of yours is only a name."""
        text = str(config.get("aggregator", "mean()"))
        name, _, arguments = text.removesuffix(")").partition("(")
        if config.get("own_directions") is not None:
            outputs = estimators.scalars_per_direction(config.get("estimator", "forward"))
            aggregator = concatenate(int(config["own_directions"]), outputs)
        elif name in AGGREGATORS:
            aggregator = AGGREGATORS[name](
                *ast.literal_eval(f"({arguments},)") if arguments else ()
            )
        else:
            aggregator = Aggregator(_unknown(text), text)
        return cls(aggregator, config.get("nonfinite", "raise"))


def _unknown(name: str) -> Function:
    def aggregate(
        scalars: Float[Array, "C K P"], weights: Float[Array, "C"]
    ) -> Float[Array, "K P"]:
        raise ValueError(f"aggregator: {name!r} is none of {tuple(AGGREGATORS)}; build the "
                         "algorithm with yours to aggregate")  # fmt: skip

    return aggregate
