"""Scalars as whole multiples of a step: sums that do not depend on the order of arrival.

A sum of floats depends on its order, a sum of integers does not; and integers can be masked and
given discrete noise. A `Grid` says what the integers stand for. It is written in the header of
the ledger, and everything that would leave it is an error: nothing wraps around.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np

from hiso_jax._engine import checks

_MOST = 2**62
"""A sum stays below, so that as much again is left for noise in 64 bits."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which integers stand for scalars, and how many of them may be added up.

    Attributes:
      step: what 1 stands for, a power of two: multiples of it are exact in floating point.
      bound: largest magnitude of a scalar, >= step.
      max_clients: of which a sum may be made.
      max_weight: largest weight of a client. Weights are whole numbers, such as counts of
        examples.

    Raises:
      ValueError: a field is out of its range, or a sum of so many would not fit in 64 bits.

    Example:
      >>> import numpy as np
      >>> grid = Grid(step=2.0**-10, bound=8.0, max_clients=3, max_weight=2)
      >>> one = grid.encode(np.array([[0.5, -1.0]]), client="ann")
      >>> two = grid.encode(np.array([[2.0, 0.25]]), weight=2, client="bob")
      >>> one.tolist(), grid.decode(grid.add([one, two]), (1, 2)).tolist()
      ([512, -1024, 1], [[1.5, -0.1666666716337204]])
    """

    step: float = 2.0**-20
    bound: float = 2.0**16
    max_clients: int = 2**20
    max_weight: int = 1

    def __post_init__(self) -> None:
        checks.number("step", self.step, 2.0**-100, 2.0**100)
        if math.frexp(self.step)[0] != 0.5:
            raise ValueError(f"step: expected a power of two, got {self.step!r}")
        checks.number("bound", self.bound, self.step)
        checks.count("max_clients", self.max_clients)
        checks.count("max_weight", self.max_weight)
        if self.max_clients * self.max_weight * self.limit > _MOST:
            raise ValueError(
                f"bound: {self.max_clients} clients of weight {self.max_weight} with scalars up to "
                f"{self.bound:g} in steps of {self.step:g} may add up to more than 2^62; take a "
                "smaller bound or a larger step"
            )

    @property
    def limit(self) -> int:
        """Largest magnitude of the integer of a scalar: `bound` in steps."""
        return int(self.bound / self.step)

    def encode(self, scalars: Any, weight: Any = 1, client: str = "?") -> np.ndarray:
        """A client's scalars times its weight as integers, and after them the weight.

        Args:
          scalars: [K, P], finite, rounded to the nearest step (ties to even).
          weight: whole number, 1 to `max_weight`.
          client: whose they are, for messages.

        Returns:
          int64 [K P + 1].

        Raises:
          ValueError: a scalar or the weight is out of range: names client, value and range.
        """
        scalars = np.asarray(scalars, np.float64)
        # A NaN is in no range; written so that it fails.
        if not (fits := np.abs(scalars) <= self.bound).all():
            where = tuple(np.argwhere(~fits)[0].tolist())
            raise ValueError(
                f"scalars: client {client!r}: expected numbers from {-self.bound:g} to "
                f"{self.bound:g} (the grid's bound), got {scalars[where]} at {list(where)}"
            )
        weight = self.weight(weight, client)
        whole = np.rint(scalars / self.step).astype(np.int64)
        # `bound` need not be a multiple of `step`: rounding up must not leave the range.
        whole = np.clip(whole, -self.limit, self.limit)
        return np.append(whole.ravel() * weight, np.int64(weight))

    def weight(self, weight: Any, client: str = "?") -> int:
        """A weight as an int.

        Raises:
          ValueError: it is no whole number from 1 to `max_weight`; names the client.
        """
        real = float(checks.number("weight", weight))
        if not (real.is_integer() and 1 <= real <= self.max_weight):
            raise ValueError(
                f"weight: client {client!r}: expected a whole number from 1 to "
                f"{self.max_weight} (the grid's max_weight), got {weight!r}"
            )
        return int(real)

    def add(self, vectors: Sequence[np.ndarray]) -> np.ndarray:
        """Sum of what `encode` gave, int64 [K P + 1]; the order does not matter.

        Raises:
          ValueError: more vectors than `max_clients`, none, or of several lengths.
        """
        if not 1 <= len(vectors) <= self.max_clients:
            raise ValueError(f"vectors: expected 1 to {self.max_clients} (the grid's max_clients), "
                             f"got {len(vectors)}")  # fmt: skip
        if len(lengths := {len(v) for v in vectors}) > 1:
            raise ValueError(f"vectors: expected one length, got {sorted(lengths)}")
        return np.asarray(np.stack(vectors).sum(0), np.int64)

    def check_sum(self, total: np.ndarray, clients: int, noise: int = 0) -> None:
        """Raise unless a sum is one that so many clients could have made.

        What was masked can only be looked at as a sum; one that is out of range was made by
        somebody who did not encode.

        Args:
          total: int64 [K P + 1], as of `add`.
          clients: how many are in it.
          noise: what noise may have added to each number, at most.

        Raises:
          ValueError: a number or the weight is out of range.
        """
        most = clients * self.max_weight * self.limit + noise
        for i, value in enumerate(total[:-1].tolist()):
            if abs(value) > most:
                raise ValueError(
                    f"total: {clients} clients cannot add up to more than {most} steps, got "
                    f"{value} at {i}: somebody's were out of range"
                )
        if not clients <= (weight := int(total[-1])) <= clients * self.max_weight:
            raise ValueError(
                f"total: expected a weight of {clients} to {clients * self.max_weight} of "
                f"{clients} clients, got {weight}"
            )

    def decode(
        self, total: np.ndarray, shape: tuple[int, int], divisor: float | None = None
    ) -> np.ndarray:
        """The mean that a sum stands for, float32 [K, P]; NaN if its weight is 0.

        Args:
          total: int64 [K P + 1], as of `add`.
          shape: (K, P).
          divisor: to divide by in the place of the sum of weights, > 0.

        Example:
          >>> Grid(step=0.5).decode(np.array([3, 2]), (1, 1)).tolist()
          [[0.75]]
        """
        total = np.asarray(total)
        if total.dtype != np.int64 or total.shape != (shape[0] * shape[1] + 1,):
            raise ValueError(f"total: expected int64 [{shape[0] * shape[1] + 1}] (scalars and the "
                             f"weight), got {total.dtype} {list(total.shape)}")  # fmt: skip
        by = int(total[-1]) if divisor is None else checks.number("divisor", divisor, 0, above=True)
        if by == 0:
            return np.full(shape, np.nan, np.float32)
        # Python's quotient of integers is rounded once, on every machine; the step is exact.
        mean = [value / by * self.step for value in total[:-1].tolist()]
        return np.array(mean, np.float64).astype(np.float32).reshape(shape)

    @property
    def config(self) -> dict[str, Any]:
        """As data, for a ledger's header."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The inverse of `config`."""
        return cls(**{field.name: config[field.name] for field in dataclasses.fields(cls)})


def clip(scalars: Any, bound: float, grid: Grid, client: str = "?") -> np.ndarray:
    """A client's scalars within an L2 norm, as integers whose own norm is within it, exactly.

    Args:
      scalars: [K, P], finite.
      bound: largest L2 norm, > 0 and at most the grid's bound.
      grid: what the integers stand for.
      client: whose they are, for messages.

    Returns:
      int64 [K P + 1]: the integers, and the weight 1.

    Raises:
      ValueError: NaN or infinite scalars, or a bound out of range.

    Example:
      >>> clip([[3.0, 4.0]], 1.0, Grid(step=2.0**-10)).tolist()
      [614, 819, 1]
    """
    return clip_all(np.asarray(scalars)[None], bound, grid, [client])[0]


def clip_all(scalars: Any, bound: float, grid: Grid, clients: Sequence[str]) -> np.ndarray:
    """`clip` of many clients at once, int64 [C, K P + 1].

    Args:
      scalars: [C, K, P], finite.
      bound: as of `clip`.
      grid: the same.
      clients: whose they are, [C].

    Raises:
      ValueError: NaN or infinite scalars, with the client's name; or a bound out of range.
    """
    checks.number("clip", bound, 0, grid.bound, above=True)
    scalars = np.asarray(scalars, np.float64)
    scalars = scalars.reshape(len(clients), math.prod(scalars.shape[1:]))
    for i in np.flatnonzero(~np.isfinite(scalars).all(1)).tolist():
        raise ValueError(f"scalars: client {clients[i]!r}: expected finite ones, got "
                         f"{scalars[i].tolist()}")  # fmt: skip
    norm = np.sqrt(np.sum(scalars**2, axis=1, keepdims=True))
    short = scalars * np.minimum(1.0, bound / np.where(norm == 0, 1.0, norm))
    # None is out of the grid's range: no number is larger than the norm, nor that than the bound.
    whole = np.clip(np.rint(short / grid.step), -grid.limit, grid.limit).astype(np.int64)
    most = int(Fraction(bound / grid.step) ** 2)
    fits = scalars.shape[1] * grid.limit**2 < 2**63  # or squares of int64 would wrap around
    for i in np.flatnonzero((whole**2).sum(1) > most) if fits else range(len(whole)):
        shrink = 1.0
        # Rounding may have made it longer: the analysis knows no tolerance, so it is made shorter.
        while (length := sum(x * x for x in whole[i].tolist())) > most:
            shrink = min(shrink * (1 - 2.0**-40), math.sqrt(most / length))
            whole[i] = np.trunc(whole[i] * shrink).astype(np.int64)
    return np.append(whole, np.ones((len(whole), 1), np.int64), axis=1)
