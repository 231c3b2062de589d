"""Perturbed leaves computed where they are used, so that no perturbed copy of all ever lives.

A loss that is given `Lazy` leaves gets one layer's perturbed weights in one turn of its scan
over layers (`scan`), and the perturbed rows of the tokens it looks up (`take`). For whatever else
is done with such a leaf, take ``leaf[...]``, which is an array. The numbers are those of
`hiso_jax.directions.perturb` to the bit: number i of a leaf's noise can be drawn alone.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import exact
from hiso_jax._engine.shapes import Array, Float, Integer, Number, Shape, Start, UInt32

Compute = Callable[[UInt32[Array, "..."], Shape, tuple[Array, ...]], Float[Array, "..."]]
"""(starts [...], shape, parts [..., *shape]) -> array [..., *shape]."""


class Lazy:
    """An array that is an elementwise function of stored arrays and of its own indices.

    Args:
      compute: ``(starts, shape, parts) -> array [*starts.shape, *shape]``: runs of elements, given
        the number of each run's first element and the runs of the stored arrays.
      shape: of the array.
      dtype: of the array.
      parts: stored arrays of that shape.
      start: number of the first element.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(6.0).reshape(3, 2)
      >>> negated = Lazy(lambda starts, shape, parts: -parts[0], x.shape, x.dtype, (x,))
      >>> take(negated, jnp.array([2, 0])).tolist()
      [[-4.0, -5.0], [-0.0, -1.0]]
      >>> (1 + negated[...]).tolist()
      [[1.0, 0.0], [-1.0, -2.0], [-3.0, -4.0]]
    """

    def __init__(
        self,
        compute: Compute,
        shape: Shape,
        dtype: Any,
        parts: tuple[Array, ...] = (),
        start: Start = 0,
    ):
        self.compute, self.shape, self.dtype = compute, shape, dtype
        self.parts, self.start = parts, start

    def __jax_array__(self) -> jax.Array:
        return self.compute(jnp.asarray(self.start, jnp.uint32), self.shape, self.parts)

    def __getitem__(self, index: Any) -> jax.Array:
        """As of an array, which is made first; ``[...]`` is the whole."""
        array = self.__jax_array__()
        return array if index is ... else array[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self[...])

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a Lazy leaf has no {name}: take leaf[...], which is an array")

    def starts(self, indices: Integer[Array, "*runs"]) -> UInt32[Array, "*runs"]:
        """Numbers of the first elements of ``self[indices]``."""
        run = np.uint32(math.prod(self.shape[1:]))
        return jnp.asarray(self.start, jnp.uint32) + indices.astype(jnp.uint32) * run

    def plus(self, x: Array, scale: Number) -> "Lazy":
        """``x + scale * self`` in the dtype of `x`, rounded alike however it is computed."""

        def compute(starts: Array, shape: Shape, parts: tuple[Array, ...]) -> Array:
            x, *others = parts
            return exact.axpy(x, scale, self.compute(starts, shape, tuple(others)))

        return Lazy(compute, x.shape, x.dtype, (x, *self.parts), self.start)


def take(table: Any, indices: Integer[Array, "..."]) -> Array:
    """``table[indices]``, of an array or of a lazy leaf, of which only these rows are computed.

    Args:
      table: [V, ...].
      indices: int array of any shape; -1 is the last row.
    """
    if not isinstance(table, Lazy):
        return jnp.take(table, indices, axis=0)
    parts = tuple(jnp.take(x, indices, axis=0) for x in table.parts)
    indices = jnp.where(indices < 0, indices + table.shape[0], indices)
    return table.compute(table.starts(indices), table.shape[1:], parts)


def scan(
    layer: Callable[..., tuple[Any, Any]],
    carry: Any,
    layers: Any,
    others: Any = None,
    begin: int = 0,
    end: int | None = None,
) -> Any:
    """``lax.scan`` over stacked layers, or some of them; their leaves [L, ...] may be lazy.

    Args:
      layer: ``(carry, (arrays, other)) -> (carry, output)``, with the arrays of one layer.
      carry: to begin with.
      layers: pytree of leaves [L, ...].
      others: pytree of further leaves [L, ...].
      begin, end: first layer, and the one to stop before; by default all L.
    """
    leaves, tree = jax.tree.flatten(layers)
    stored = [x.parts if isinstance(x, Lazy) else x for x in leaves]
    numbers = jnp.arange(leaves[0].shape[0], dtype=jnp.uint32)[begin:end]
    some = len(numbers) < leaves[0].shape[0]

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        number, rows, other = inputs
        if some:
            # Looked up layer by layer: a slice of the stack would be a copy of all of them.
            at = lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False)  # noqa: E731
            rows, other = jax.tree.map(at, (stored, others))
        arrays = [
            x.compute(x.starts(number), x.shape[1:], part) if isinstance(x, Lazy) else part
            for x, part in zip(leaves, rows, strict=True)
        ]
        return layer(carry, (tree.unflatten(arrays), other))

    scanned = (None, None) if some else (stored, others)
    return jax.lax.scan(step, carry, (numbers, *scanned))
