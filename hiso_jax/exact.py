"""Float arithmetic that every program rounds the same way.

Compilers contract ``a * b + c`` into a fused multiply-add in one program and not in
the next, depending on what they fuse and unroll, so two parties that run the same
source may disagree in the last bit. A product that has passed through `seal` cannot
be contracted: the clamp changes what an infinity would become, so no compiler may
look through it.
"""

from collections.abc import Sequence

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


def _horner(x: jax.Array, coefficients: Sequence[jax.typing.ArrayLike]) -> jax.Array:
    """Evaluate a polynomial, highest power first."""
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = mul(total, x) + coefficient
    return total


def _log(x: jax.Array) -> jax.Array:
    """Natural logarithm of normal float32 numbers, to about 1e-7 (Cephes' logf)."""
    pattern = lax.bitcast_convert_type(x, jnp.int32)
    # x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)).
    exponent = (pattern - 0x3F3504F3) >> 23
    mantissa = lax.bitcast_convert_type(pattern - (exponent << 23), jnp.float32)
    t, e = mantissa - 1, exponent.astype(jnp.float32)
    square = mul(t, t)
    tail = mul(mul(_horner(t, _LOG), t), square) - mul(jnp.float32(0.5), square)
    # ln 2 in two parts, the first exact in a product with the exponent.
    return (t + (tail - mul(e, jnp.float32(2.12194440e-4)))) + mul(e, jnp.float32(0.693359375))


def normal_quantile(x: jax.Array) -> jax.Array:
    """Return ``sqrt(2) erf_inv(x)``: x uniform in (-1, 1) becomes N(0, 1).

    Giles' single-precision polynomials (GPU Computing Gems, 2010), built from integer
    operations, sums and sealed products only: ``lax.erf_inv`` differs in the last bit
    between programs, this one does not.

    Args:
      x: float32 in [-1 + 2^-24, 1 - 2^-24].
    """
    w = -_log(mul(1 - x, 1 + x))
    near = w < 5
    t = jnp.where(near, w - 2.5, jnp.sqrt(w) - 3)
    pairs = [jnp.where(near, a, b) for a, b in zip(_CENTRE, _TAIL, strict=True)]
    return mul(mul(_horner(t, pairs), x), jnp.float32(2**0.5))


# fmt: off
_LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]
_CENTRE = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
           -0.00125372503, -0.00417768164, 0.246640727, 1.50140941]
_TAIL = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
         -0.0076224613, 0.00943887047, 1.00167406, 2.83297682]
# fmt: on


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
