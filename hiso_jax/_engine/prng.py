"""Random bits and what is made of them: the cipher, the laws of the noise, stochastic rounding.

Word number i of a stream is the cipher of counter i, so any part of a leaf can be drawn alone, in
any program, to the same bits.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from hiso_jax._engine import checks, exact
from hiso_jax._engine.shapes import Array, Float, Index, Key, Shape, Start, UInt32

Distribution = Literal["normal", "near_normal", "rademacher"]
DEFAULT: Distribution = "near_normal"
"""The papers' law is the normal. This one differs from it by 1.4e-4 in its distribution function,
and costs a quarter: on a CPU without AVX-512 a round takes 1.82 times its forward passes with
normal noise and 1.34 times with this (docs/performance.md)."""


def check_distribution(distribution: str) -> Distribution:
    """Return `distribution`, or raise ValueError naming the choices."""
    return checks.choice("distribution", distribution, get_args(Distribution))


# Inlined, so it fuses as ever; jit keeps what was traced, a hundred operations for every leaf.
@functools.partial(jax.jit, inline=True)
def threefry(
    key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), the cipher of ``jax.random``.

    The same words as jax's own, written so that it fuses with what consumes it: several times
    faster on CPU, quicker to compile, and no array of counters is ever in memory.

    Args:
      key, counter: pairs of uint32 arrays that broadcast together.

    Returns:
      A pair of uint32 arrays of random words.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            x = x + y
            y = x ^ ((y << turn) | (y >> (32 - turn)))
        x = x + schedule[(block + 1) % 3]
        y = y + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x, y


def fold_in(key: Key[Array, "..."], counter: Start) -> Key[Array, "..."]:
    """``jax.random.fold_in``, bit for bit, in one piece of code instead of four loops.

    Args:
      key: a key, or an array of them.
      counter: uint32, or an array of them, that broadcasts with `key`.

    Returns:
      Keys of the shape to which both broadcast.

    Example:
      >>> import jax
      >>> key = jax.random.key(0)
      >>> bool(fold_in(key, 7) == jax.random.fold_in(key, 7))
      True
    """
    data, counter = jax.random.key_data(key), jnp.asarray(counter, jnp.uint32)
    pair = threefry((data[..., 0], data[..., 1]), (jnp.zeros_like(counter), counter))
    return jax.random.wrap_key_data(jnp.stack(pair, -1), impl="threefry2x32")


def words(key: Key[Array, ""], size: int, start: Start = 0) -> UInt32[Array, "... N"]:
    """Random words: word i is the cipher of counter i, so any part can be drawn alone.

    `start` may be an array: that many runs of `size` words, [*start.shape, size].
    """
    return pairs(key, size, start)[0]


def pairs(
    key: Key[Array, ""], size: int, start: Start
) -> tuple[UInt32[Array, "*runs N"], UInt32[Array, "*runs N"]]:
    """`words`, and the second words of the same counters."""
    data = jax.random.key_data(key)
    if size > 2**32:
        raise ValueError(f"params: a leaf needs {size} random words, more than its 2^32 counters")
    start = jnp.asarray(start, jnp.uint32)[..., None]
    low = start + jax.lax.broadcasted_iota(
        jnp.uint32, (*(1,) * (start.ndim - 1), size), start.ndim - 1
    )
    return threefry((data[0], data[1]), (jnp.zeros_like(low), low))


# Inlined where it is traced; by itself one program, instead of one for every operation.
@functools.partial(jax.jit, static_argnames=("shape", "distribution"), inline=True)
def draw(
    key: Key[Array, ""], shape: Shape, distribution: Distribution, start: Start = 0
) -> Float[Array, "..."]:
    """Draw zero-mean, unit-variance, independent float32 noise.

    ``"normal"`` is N(0, 1), the paper's: number i, counted over the flattened leaf, comes from
    word i. ``"near_normal"`` is N(0, 1) to 1.4e-4 in its distribution function, from -6.4 to
    6.4, for a quarter of the price: see `from_words`. ``"rademacher"`` is +1 or -1, sign i
    from bit 31 - i % 32 of word i // 32: integers only, and cheaper still.

    Args:
      key: of one leaf in one direction.
      shape: of what is drawn.
      distribution: one of `Distribution`.
      start: number of the first element, a multiple of 32, to draw a part of a leaf; an array of
        them gives as many runs, [*start.shape, *shape].

    Example:
      >>> import jax
      >>> draw(jax.random.key(0), (2, 3), "rademacher").shape
      (2, 3)
    """
    size, start = math.prod(shape), jnp.asarray(start, jnp.uint32)
    (count,) = words_of([size], distribution)
    if distribution != "rademacher":
        drawn = pairs(key, count, start)
    else:
        # Fused with what follows, a CPU would compute the word of every sign anew.
        wrap = functools.partial(jax.random.wrap_key_data, impl="threefry2x32")
        cipher = lambda data, start: words(wrap(data), count, start)  # noqa: E731
        signs = jax.lax.platform_dependent(
            jax.random.key_data(key),
            start >> 5,
            cpu=lambda *args: exact.compiled_alone(cipher, *args),
            default=cipher,
        )
        drawn = (signs, signs)
    return from_words(drawn, distribution)[..., :size].reshape(*start.shape, *shape)


def words_of(sizes: Sequence[int], distribution: Distribution) -> list[int]:
    """How many random words the noise of leaves of these sizes takes."""
    return [-(-size // 32) if distribution == "rademacher" else size for size in sizes]


def from_words(
    pairs: tuple[UInt32[Array, "... N"], UInt32[Array, "... N"]], distribution: Distribution
) -> Float[Array, "... M"]:
    """Noise [..., N] of the two words of counters, [..., N] each or, for signs, [..., N / 32].

    A near-normal number adds up 32 signs, the bits of the first word, and to be continuous the
    difference of the second's halves; that has excess kurtosis -0.06, which a cubic
    (Cornish-Fisher) takes away. Signs and normal numbers have no use for the second word.
    """
    words, others = pairs
    if distribution == "normal":
        integers = jax.lax.bitcast_convert_type(words, jnp.int32) >> 8
        # Exact, symmetric and inside (-1, 1): 24 bits hold an odd multiple of 2^-24.
        return exact.normal_quantile((integers.astype(jnp.float32) + 0.5) * jnp.float32(2**-23))
    if distribution == "near_normal":
        ones = jax.lax.population_count(words).astype(jnp.int32) - 16
        halves = (others >> 16).astype(jnp.int32) - (others & 0xFFFF).astype(jnp.int32)
        return exact.near_normal((ones << 16) + halves)
    # Bit j becomes the sign bit of the j-th number: +1.0 is 0x3f800000.
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    signs = (words[..., None] << shifts) & jnp.uint32(0x80000000)
    ones = jax.lax.bitcast_convert_type(signs | jnp.uint32(0x3F800000), jnp.float32)
    return ones.reshape(*words.shape[:-1], -1)


def round_to(
    key: Key[Array, ""], x: Float[Array, "*shape"], dtype: Any, start: Index = 0
) -> Float[Array, "*shape"]:
    """Round float32 to a narrower `dtype`, stochastically; `key` and `start` as of `draw`.

    What is of that type already, float64 included, stays as it is.
    """
    if dtype == x.dtype:
        return x
    drawn = words(key, x.size, start).reshape(x.shape)
    return exact.stochastic_round(drawn, x, dtype)
