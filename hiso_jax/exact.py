"""Float arithmetic that every program rounds the same way.

Compilers contract ``a * b + c`` into a fused multiply-add in one program and not in
the next, depending on what they fuse and unroll, so two parties that run the same
source may disagree in the last bit. A product that has passed through `seal` cannot
be contracted: the clamp changes what an infinity would become, so no compiler may
look through it.
"""

import jax
import jax.numpy as jnp
from jax import lax


def seal(x: jax.Array) -> jax.Array:
    """Return `x` unchanged (infinities become the largest finite value), uncontractable.

    Args:
      x: any float array.

    Returns:
      An array equal to `x` wherever `x` is finite; NaN stays NaN.
    """
    limit = jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
    return lax.clamp(-limit, x, limit)


def mul(a: jax.typing.ArrayLike, b: jax.typing.ArrayLike) -> jax.Array:
    """Multiply and round once, whatever the compiler fuses around it.

    Example:
      >>> import jax.numpy as jnp
      >>> float(mul(jnp.float32(3.0), jnp.float32(0.5)))
      1.5
    """
    return seal(jnp.multiply(a, b))


def stochastic_round(key: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round float32 to a narrower float at random, so that its expectation is `x`.

    Rounding to nearest would lose every update smaller than half a unit in the last
    place, which at bfloat16 is nearly every zeroth-order update. The random bits come
    from the shared key, so all parties round alike.

    Args:
      key: typed PRNG key, consumed.
      x: float32 array.
      dtype: float32 (returned unchanged), bfloat16 or float16.
    """
    if dtype == jnp.float32:
        return x
    nearest = x.astype(dtype)
    error = x - nearest.astype(jnp.float32)  # exact: both have few bits
    towards = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
    neighbour = jnp.nextafter(nearest, towards)
    gap = jnp.abs(neighbour.astype(jnp.float32) - nearest.astype(jnp.float32))
    # 24 random bits make a uniform number in [0, 1) without rounding.
    uniform = (jax.random.bits(key, x.shape, jnp.uint32) >> 8).astype(jnp.float32)
    move = mul(uniform, gap) < mul(jnp.abs(error), jnp.float32(2**24))
    return jnp.where(move & jnp.isfinite(neighbour), neighbour, nearest)
