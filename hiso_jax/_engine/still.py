"""What stays still: directions that move only a part of a model, its last layers say."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import checks, packing, trees
from hiso_jax._engine.shapes import Array, Float, Index, Shape, Start, UInt32


class Part(NamedTuple):
    """The last `directions` of a client (or those before the next part's) move these leaves only.

    Attributes:
      leaves: name of a leaf -> its first row, along the first axis, that moves: 0 for a whole leaf,
        4 for the last two of six stacked layers. Leaves that are not named stay still.
      directions: how many of the P of a local step.
    """

    leaves: Mapping[str, int]
    directions: int


class Still(NamedTuple):
    """Which leaves some of a client's directions move alone; all others stay still.

    Attributes:
      parts: in the order of the directions; those before the first part's move everything.

    Example:
      >>> still = Still((Part({"v": 0}, 4), Part({"v": 2}, 1)))  # of P = 6
      >>> still.firsts(6), still.bounds("v", (3, 5)).tolist(), still.bounds("w", (7,)).tolist()
      ((1, 5), [0, 10], [7, 7])
    """

    parts: tuple[Part, ...]

    def wholes(self, perturbations: int) -> int:
        """How many of P directions move everything."""
        return perturbations - sum(part.directions for part in self.parts)

    def firsts(self, perturbations: int) -> tuple[int, ...]:
        """Number of the first direction of each part, of P."""
        counts = [self.wholes(perturbations), *(part.directions for part in self.parts[:-1])]
        return tuple(np.cumsum(counts).tolist())

    def bounds(self, name: str, shape: Shape) -> UInt32[np.ndarray, "parts"]:
        """For each part, the number of the first element of a leaf that moves."""
        rows = [part.leaves.get(name) for part in self.parts]
        run, size = math.prod(shape[1:]), math.prod(shape)
        return np.array([size if r is None else r * run if r else 0 for r in rows], np.uint32)

    def check(self, leaves: trees.Leaves) -> None:
        """Raise ValueError unless what moves is among the trainable leaves."""
        for part in self.parts:
            for name, row in part.leaves.items():
                if name not in leaves:
                    raise ValueError(
                        f"upper: {name!r} is none of the trainable leaves {list(leaves)}"
                    )
                if row and row >= len(leaves[name]):
                    raise ValueError(
                        f"upper: {name!r} has {len(leaves[name])} rows, none from {row} on"
                    )

    @property
    def config(self) -> Any:
        """As data: one part, or a list of them."""
        parts = [{"leaves": dict(p.leaves), "directions": p.directions} for p in self.parts]
        return parts[0] if len(parts) == 1 else parts

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """The inverse of `config`."""
        parts = config if isinstance(config, list) else [config]
        return cls(tuple(Part(part["leaves"], int(part["directions"])) for part in parts))


def check_part(part: Any, perturbations: int) -> None:
    """Raise TypeError or ValueError for a part that is none."""
    if checks.count("upper: directions", part.directions) > perturbations:
        raise ValueError(f"upper: directions are at most num_perturbations={perturbations}, got "
                         f"{part.directions}")  # fmt: skip
    rows = part.leaves.values()
    if not part.leaves or not all(isinstance(row, int) and row >= 0 for row in rows):
        raise ValueError(f"upper: leaves must name leaves and rows >= 0, got {part.leaves!r}")


def bound_of(
    number: Index, firsts: Sequence[int], bounds: UInt32[Array | np.ndarray, "parts"]
) -> UInt32[Array, ""]:
    """Number of the first element that moves along direction `number` of a client."""
    bound = jnp.uint32(0)
    for i, first in enumerate(firsts):
        bound = jnp.where(number >= first, jnp.asarray(bounds[i], jnp.uint32), bound)
    return bound


def only(
    drawn: Float[Array, "..."], start: Start, shape: Shape, bound: UInt32[Array, ""]
) -> Float[Array, "..."]:
    """Noise with zeros before element number `bound`.

    Args:
      drawn: runs of noise, [*start.shape, *shape].
      start: number of each run's first element.
      shape: of a run.
      bound: of the leaf.
    """
    start = jnp.asarray(start, jnp.uint32)
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(*[1] * start.ndim, *shape)
    number = start.reshape(*start.shape, *[1] * len(shape)) + index
    return jnp.where(number >= bound, drawn, 0)


def masked(
    noise: Callable[..., Float[Array, "..."]],
    still: Still,
    perturbations: int,
    shapes: Mapping[str, Shape],
    packs: packing.Packs,
) -> Callable[..., Float[Array, "..."]]:
    """The noise of leaves and packs, zero for what stays still.

    Args:
      noise: (leaf or pack, local step, direction, shape, start) -> u, of everything.
      still: what stays still; direction number p is number p % P of a client.
      perturbations: P.
      shapes: of the leaves.
      packs: from `hiso_jax._engine.packing.plan`.
    """
    firsts, wholes = still.firsts(perturbations), still.wholes(perturbations)

    def draw_one(name: str, k: Index, p: Index, shape: Shape, start: Start) -> Float[Array, "..."]:
        members = packs.get(name) or {name: shapes[name]}
        bounds = [(still.bounds(n, s), math.prod(s)) for n, s in members.items()]
        if not wholes and all((bound == size).all() for bound, size in bounds):
            return jnp.zeros((*jnp.shape(start), *shape), jnp.float32)
        drawn, number = noise(name, k, p, shape, start), p % perturbations
        if name not in packs:
            return only(drawn, start, shape, bound_of(number, firsts, bounds[0][0]))
        moves = jnp.ones(sum(size for _, size in bounds), bool)
        for i, first in enumerate(firsts):
            above = jnp.concatenate([jnp.arange(size) >= int(bound[i]) for bound, size in bounds])
            moves = jnp.where(number >= first, above, moves)
        return jnp.where(moves, drawn, 0)

    return draw_one
