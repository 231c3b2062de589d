"""Digests: sixty-four bits by which two parties know that they hold the same bits.

Every element is mixed with its place in its leaf and with the leaf's name, type and shape,
twice, and the results are added up modulo 2^32. Sums do not mind their order, so the
digest is the same under any sharding, in any program and leaf by leaf. Both mixings are
bijections of the element, so a change of one element always changes the digest; other
changes, such as a swap, are missed once in about 2^64. It finds accidents, not forgers:
whoever may write the parameters can also look for another set with the same digest.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hiso_jax._engine import trees


def digest(tree: Any) -> jax.Array:
    """Fingerprint the bit patterns of a state's parameters and rule state, on the device.

    The key and the number of the round are left out: a round that moves nothing leaves the
    digest as it was.

    Args:
      tree: a `hiso_jax.State`, or any pytree of arrays (the parameters alone, say).

    Returns:
      uint32 [2]; `text` makes sixteen hexadecimal digits of it.

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = digest({"w": jnp.array([1.0, 2.0])}), digest({"w": jnp.array([2.0, 1.0])})
      >>> text(a) == text(b)
      False
    """
    return _digest(content(tree))


def content(tree: Any) -> Any:
    """What of a tree is fingerprinted, with the names it is fingerprinted by."""
    if hasattr(tree, "params") and hasattr(tree, "rule"):
        return {"params": tree.params, "rule": tree.rule}
    return tree


@jax.jit
def _digest(tree: Any) -> jax.Array:
    total = jnp.zeros(2, jnp.uint32)
    for name, leaf in trees.named(tree).items():
        total += part(leaf, salts(name, leaf))
    return total


_part = jax.jit(lambda x, salts: part(x, salts))


def by_leaf(tree: Any) -> dict[str, np.ndarray]:
    """Digest of every leaf of a pytree by name; their sum is the digest of the tree.

    Compiled once a shape instead of once a tree, for trees that are seen once.
    """
    return {n: np.asarray(_part(x, salts(n, x))) for n, x in trees.named(tree).items()}


def total(digests: Iterable[np.ndarray]) -> np.ndarray:
    """Add up digests uint32 [2]."""
    return np.sum(list(digests), 0, dtype=np.uint32).reshape(2)


def salts(name: str, leaf: Any) -> np.ndarray:
    """Two words, uint32 [2], that stand for a leaf's name, type and shape."""
    identity = f"{name}:{jnp.result_type(leaf)}:{tuple(jnp.shape(leaf))}"
    return np.frombuffer(hashlib.sha256(identity.encode()).digest()[:8], "<u4").astype(np.uint32)


def part(x: Any, salts: Any, start: Any = 0, size: Any = None, skip: Any = 0) -> jax.Array:
    """Digest of a leaf, or of the part of a flattened leaf that begins at `start`.

    The parts of a leaf, with the leaf's salts, add up to the digest of the leaf.

    Args:
      x: array; 1-dimensional if it is a part.
      salts: of the leaf, uint32 [2].
      start: number of the first element.
      size: elements that count, all by default; the rest of a padded part adds nothing.
      skip: elements before them that do not count.

    Returns:
      uint32 [2].
    """
    x = jnp.asarray(x)
    bits = _patterns(x)
    words = math.prod(bits.shape[x.ndim :])  # of an element: two of float64, of a key
    bits = bits.reshape(1) if bits.ndim == 0 else bits
    position, stride = jnp.uint32(start) * np.uint32(words), 1
    for axis in reversed(range(bits.ndim)):
        index = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position, stride = position + index * np.uint32(stride % 2**32), stride * bits.shape[axis]
    # Odd factors and shifts that are known to mix well (murmur3).
    first = (bits ^ (position * np.uint32(0x9E3779B9) + salts[0])) * np.uint32(0x85EBCA6B)
    first = first ^ (first >> 15)
    second = (first + salts[1]) * np.uint32(0xC2B2AE35)
    second = second ^ (second >> 13)
    if size is not None:
        index = lax.iota(jnp.uint32, bits.shape[0]) - jnp.asarray(skip, jnp.uint32)
        inside = index < jnp.asarray(size, jnp.uint32)  # below `skip` it wraps around to large
        inside = inside.reshape(-1, *[1] * (bits.ndim - 1))
        first, second = jnp.where(inside, first, 0), jnp.where(inside, second, 0)
    # Both sums in one reduction read the leaf once, and run many times faster than two sums.
    zero = np.uint32(0)
    both = lax.reduce((first, second), (zero, zero), _add, (bits.ndim - 1,))
    return jnp.stack([lane.sum(dtype=jnp.uint32) for lane in both])


def _add(a: Any, b: Any) -> Any:
    return a[0] + b[0], a[1] + b[1]


def _patterns(x: jax.Array) -> jax.Array:
    """The bit patterns of any array as uint32, with an axis more where they are wider."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    if str(x.dtype) in ("int2", "int4", "uint2", "uint4"):  # too narrow to be viewed as anything
        return x.astype(jnp.int32).astype(jnp.uint32)
    if x.dtype.itemsize >= 4:
        return lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)


def text(digest: Any) -> str:
    """Sixteen hexadecimal digits of a digest uint32 [2]."""
    low, high = (int(word) for word in np.asarray(digest))
    return f"{high:08x}{low:08x}"


def parse(digits: str) -> np.ndarray:
    """The digest uint32 [2] that `text` wrote.

    Raises:
      ValueError: not sixteen hexadecimal digits.
    """
    if len(digits) != 16 or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"digest: expected sixteen hexadecimal digits, got {digits!r}")
    return np.array([int(digits[8:], 16), int(digits[:8], 16)], np.uint32)
