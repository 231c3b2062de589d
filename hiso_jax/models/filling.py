"""Leaves filled from files, some rows of one tensor at a time: one copy of all and a little."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from hiso_jax._engine.tensorfile import TensorFile
from hiso_jax.models.names import is_stacked, is_turned
from hiso_jax.models.torchfile import TorchFile

_PIECE = 2**20  # numbers read at a time
_LARGE = 2**25  # numbers of a leaf that is not to be in memory twice, nor long on the way


def fill(
    leaves: dict[str, Any],
    plan: dict[str, list[str]],
    there: dict[str, TensorFile],
    dtype: np.dtype,
    shown: Any,
) -> dict[str, jax.Array]:
    """Read the leaves.

    Args:
      leaves: shapes, by name.
      plan: the tensors that each leaf is made of, by name.
      there: the files that tensors are in, by name.
      dtype: of the leaves.
      shown: the name on the bar, if there is to be one.
    """
    filled: dict[str, jax.Array] = {}
    # Largest first: what is in memory twice is large only while there is little else.
    order = sorted(leaves, key=lambda leaf: -leaves[leaf].size)
    for leaf in tqdm(order, desc=f"loading {shown}", disable=None if shown else True):
        shape = leaves[leaf].shape
        if not (is_stacked(leaf) or is_turned(leaf)) and math.prod(shape) > _LARGE:
            filled[leaf] = _grown(there, plan[leaf][0], dtype)
            continue
        array: np.ndarray = np.empty(shape, dtype)
        for place, name in zip(array if is_stacked(leaf) else [array], plan[leaf], strict=True):
            turned = place.T if is_turned(leaf) else place
            for start, rows in _pieces(there, name):
                turned[start : start + len(rows)] = rows
        filled[leaf] = jax.block_until_ready(jax.device_put(array))
    return filled


def _pieces(
    there: dict[str, TensorFile], name: str, least: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, `least` rows [n, ...] or more) of a tensor, piece by piece."""
    file, shape = there[name], there[name].tensors[name].shape
    width = math.prod(shape[1:])
    step = max(_PIECE // max(width, 1), least)
    if isinstance(file, TorchFile) and file.is_strided(name):
        step = max(shape[0], 1)  # each piece would be taken from the whole
    for start in range(0, shape[0], step):
        count = min(step, shape[0] - start)
        yield start, file.read(name, start * width, count * width).reshape(count, *shape[1:])


@functools.partial(jax.jit, donate_argnums=0)
def _put(array: jax.Array, rows: jax.Array, start: Any) -> jax.Array:
    put = lambda array, rows: jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)  # noqa: E731
    if array.dtype != jnp.bfloat16:
        return put(array, rows)
    # As bits: for CPUs, XLA would widen all of it.
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (array, rows))
    return jax.lax.bitcast_convert_type(put(*bits), jnp.bfloat16)


def _grown(there: dict[str, TensorFile], name: str, dtype: np.dtype) -> jax.Array:
    """A tensor put together where JAX has it; embeddings may be most of a model."""
    shape = there[name].tensors[name].shape
    array = jnp.zeros(shape, dtype)
    # Not more pieces than these: with bits, each one goes through all of the array.
    for start, rows in _pieces(there, name, shape[0] // 128 + 1):
        some = rows.astype(dtype, copy=False)
        array = jax.block_until_ready(_put(array, some, np.int32(start)))
    return array


def whole(there: dict[str, TensorFile], name: str) -> np.ndarray:
    """Read a tensor at once."""
    tensor = there[name].tensors[name]
    return there[name].read(name, 0, tensor.size).reshape(tensor.shape)


def check_tied(there: dict[str, TensorFile], table: str, name: str) -> None:
    """Raise ValueError unless a copy of the embeddings is one."""
    one, two = whole(there, table), whole(there, name)
    if one.tobytes() != two.tobytes():
        raise ValueError(f"the config ties {name!r} to {table!r}, they differ")
