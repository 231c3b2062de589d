"""Float arithmetic that every program, on every backend, rounds the same way.

Three things make two parties that run the same source disagree in the last bit:

* Compilers contract ``a * b + c`` into a fused multiply-add in one program and not in the
  next. A product that has passed through `no_fma` or `mul` cannot be contracted: they
  are integer operations that change what a NaN or a subnormal number would become, so no
  compiler may look through them.
* Divisions, square roots and transcendental functions are approximations of their own on
  every accelerator. Nothing here uses one: only integer operations, comparisons, sums and
  products, which IEEE 754 rounds correctly everywhere.
* Subnormal numbers (below 2^-126) are kept by some processors and zero on others. `mul`
  and `flush_subnormals` make them zero on all.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hiso_jax._engine import renamed


def compiler_options() -> dict[str, int]:
    """Options for ``jax.jit`` under which noise costs least; the bits are the same without.

    A CPU's compiler takes half of the vector width that it could, for fear of lower clocks; noise
    is drawn 1.4 times faster with all of it.

    Example:
      >>> import jax
      >>> step = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    """
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def compiled_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function compiled by itself, as the branch of a condition that always holds.

    Nothing around it is fused into it, so what it computes is computed once, and rounds alike
    in every program, even with divisions or powers inside.

    Example:
      >>> import jax.numpy as jnp
      >>> float(compiled_alone(jnp.sqrt, jnp.float32(4.0)))
      2.0
    """
    nothing = jax.tree.map(
        lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(function, *args)
    )
    always = lax.optimization_barrier(jnp.bool_(True))
    return lax.cond(always, function, lambda *args: nothing, *args)


@contextlib.contextmanager
def usual_types() -> Iterator[None]:
    """Types and random bits as JAX chooses them unless it is told otherwise.

    For functions that are others': a schedule computed in float64 is another in its last bits, and
    so are weights drawn from other bits, and parties would part there.
    """
    usual = (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.threefry_partitionable(True),
    )
    with contextlib.ExitStack() as stack:
        for setting in usual:
            stack.enter_context(setting)
        yield


def no_fma(x: jax.Array) -> jax.Array:
    """Return `x` unchanged, uncontractable; the cheapest, for products that cannot be subnormal.

    One integer minimum, which touches no number but a NaN (that stays one). A clamp costs
    six times as much on a CPU, most of it for the care it takes of NaN. Not for squares of
    numbers that cannot be NaN: a compiler that knows a sign knows that the minimum does nothing.

    Args:
      x: float32 array.

    Example:
      >>> import jax.numpy as jnp
      >>> no_fma(jnp.array([1.5, -0.0, jnp.inf])).tolist()
      [1.5, -0.0, inf]
    """
    pattern = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type(jnp.minimum(pattern, jnp.uint32(2**32 - 2)), jnp.float32)


def flush_subnormals(x: jax.Array) -> jax.Array:
    """Make the subnormal numbers of a float32 array zero of the same sign, uncontractable.

    Those of a float64 array likewise.

    Example:
      >>> import numpy as np
      >>> flush_subnormals(np.array([1e-40, 1.0, -2.0], np.float32)).tolist()
      [0.0, 1.0, -2.0]
    """
    double = x.dtype == jnp.float64
    integer, exponent, sign = (
        (jnp.int64, 0x7FF << 52, -(2**63)) if double else (jnp.int32, 0x7F800000, -(2**31))
    )
    pattern = lax.bitcast_convert_type(x, integer)
    zero = pattern & integer(sign)
    flushed = jnp.where(pattern & integer(exponent) == 0, zero, pattern)
    return lax.bitcast_convert_type(flushed, jnp.float64 if double else jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """Return an array in the type that its updates are added in: float64 stays, others float32.

    Example:
      >>> import jax.numpy as jnp
      >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def mul(a: jax.typing.ArrayLike, b: jax.typing.ArrayLike) -> jax.Array:
    """Multiply float32 numbers and round once, whatever the compiler fuses around it.

    Example:
      >>> import jax.numpy as jnp
      >>> float(mul(jnp.float32(3.0), jnp.float32(0.5)))
      1.5
    """
    # With 64-bit types a float64 number of NumPy's, unlike Python's, would make float64 of it all.
    return flush_subnormals(jnp.asarray(a, jnp.float32) * jnp.asarray(b, jnp.float32))


def axpy(x: jax.Array, scale: Any, direction: jax.Array) -> jax.Array:
    """Return ``x + scale * direction`` in the dtype of `x`, computed in float32 at least."""
    start = wide(x)
    step = no_fma(jnp.asarray(scale, jnp.float32) * direction)
    return (start + step.astype(start.dtype)).astype(x.dtype)


def rsqrt(x: jax.Array) -> jax.Array:
    """Return 1 / sqrt(x) of positive normal float32 numbers, to 2 units in the last place.

    Three Newton steps from the well-known integer guess.

    Example:
      >>> import jax.numpy as jnp
      >>> float(rsqrt(jnp.float32(4.0)))
      0.5
    """
    guess = jnp.int32(0x5F3759DF) - (lax.bitcast_convert_type(x, jnp.int32) >> 1)
    y, half = lax.bitcast_convert_type(guess, jnp.float32), no_fma(jnp.float32(0.5) * x)
    for _ in range(3):
        # As a correction of y, not a product: so the roots of powers of four are exact.
        y = y + no_fma(y * (jnp.float32(0.5) - no_fma(no_fma(half * y) * y)))
    return y


def sqrt(x: jax.Array) -> jax.Array:
    """Return the square root of positive normal float32 numbers, to 3 units in the last place.

    Example:
      >>> import jax.numpy as jnp
      >>> float(sqrt(jnp.float32(4.0)))
      2.0
    """
    return _times(x, rsqrt(x))


def reciprocal(x: jax.Array) -> jax.Array:
    """Return 1 / x of float32 numbers from 2^-60 to 2^60, to 5 units in the last place.

    Example:
      >>> import jax.numpy as jnp
      >>> float(reciprocal(jnp.float32(4.0)))
      0.25
    """
    root = rsqrt(x)
    return _times(root, root)


def total(x: jax.Array) -> jax.Array:
    """Add up a vector of float32 numbers in its order, which ``jnp.sum`` does not promise.

    Example:
      >>> import jax.numpy as jnp
      >>> float(total(jnp.array([1.0, 2.0, 3.0])))
      6.0
    """
    return lax.fori_loop(0, x.shape[0], lambda i, sum: sum + x[i], jnp.float32(0))


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply numbers whose product is never subnormal."""
    return no_fma(a * b)


def _horner(x: jax.Array, coefficients: Sequence[jax.typing.ArrayLike]) -> jax.Array:
    """Evaluate a polynomial, highest power first."""
    total = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = _times(total, x) + coefficient
    return total


def _log(x: jax.Array) -> jax.Array:
    """Natural logarithm of normal float32 numbers, to about 1e-7 (Cephes' logf)."""
    pattern = lax.bitcast_convert_type(x, jnp.int32)
    # x = mantissa * 2^exponent with the mantissa in [sqrt(1/2), sqrt(2)).
    exponent = (pattern - 0x3F3504F3) >> 23
    mantissa = lax.bitcast_convert_type(pattern - (exponent << 23), jnp.float32)
    t, e = mantissa - 1, exponent.astype(jnp.float32)
    square = _times(t, t)
    tail = _times(_times(_horner(t, _LOG), t), square) - _times(jnp.float32(0.5), square)
    # ln 2 in two parts, the first exact in a product with the exponent.
    return (t + (tail - _times(e, jnp.float32(2.12194440e-4)))) + _times(
        e, jnp.float32(0.693359375)
    )


def normal_quantile(x: jax.Array) -> jax.Array:
    """Return ``sqrt(2) erf_inv(x)``: x uniform in (-1, 1) becomes N(0, 1).

    Giles' single-precision polynomials (GPU Computing Gems, 2010). ``lax.erf_inv`` differs
    in the last bit between programs, this one does not.

    Args:
      x: float32 in [-1 + 2^-24, 1 - 2^-24].
    """
    w = -_log(_times(1 - x, 1 + x))
    near = w < 5
    t = jnp.where(near, w - 2.5, _times(w, rsqrt(w)) - 3)
    pairs = [jnp.where(near, a, b) for a, b in zip(_CENTRE, _TAIL, strict=True)]
    return _times(_times(_horner(t, pairs), x), jnp.float32(2**0.5))


def near_normal(x: jax.Array) -> jax.Array:
    """Make the int32 numbers of `hiso_jax.directions.from_words` near N(0, 1): a x + b x^3.

    In units of 2^-16 they have variance 8 + 1/6, and fourth cumulant -4 - 1/60.
    """
    y = x.astype(jnp.float32)  # exact: below 2^24
    return _times(y, jnp.float32(_LINE)) + _times(y * y, y * jnp.float32(_CUBE))


# fmt: off
_LINE, _CUBE = 5.299977501e-06, 3.820463129e-19
_LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]
_CENTRE = [2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087,
           -0.00125372503, -0.00417768164, 0.246640727, 1.50140941]
_TAIL = [-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773,
         -0.0076224613, 0.00943887047, 1.00167406, 2.83297682]
# fmt: on


def stochastic_round(words: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Round float32 to a narrower float at random, so that its expectation is `x`.

    Rounding to nearest would lose every update smaller than half a unit in the last
    place, which at bfloat16 is nearly every zeroth-order update. The random words come
    from the shared key, so all parties round alike.

    Args:
      words: random uint32 words of the shape of `x`.
      x: float32 array.
      dtype: bfloat16 or float16.
    """
    nearest = x.astype(dtype)
    error = x - nearest.astype(jnp.float32)  # exact: both have few bits
    # Not towards infinity, which JAX's debug modes would take for a fault; it is the same step.
    limit = jnp.finfo(dtype).max
    towards = jnp.where(error > 0, limit, -limit).astype(dtype)
    neighbor = jnp.nextafter(nearest, towards)
    gap = jnp.abs(neighbor.astype(jnp.float32) - nearest.astype(jnp.float32))
    # 24 random bits make a uniform number in [0, 1) without rounding.
    uniform = (words >> 8).astype(jnp.float32)
    move = mul(uniform, gap) < mul(jnp.abs(error), jnp.float32(2**24))
    return jnp.where(move & jnp.isfinite(neighbor), neighbor, nearest)


__getattr__ = renamed.functions(
    globals(), seal="no_fma", apart="compiled_alone", move="axpy", flush="flush_subnormals"
)
