"""Whether a function of arrays works element by element, by the operations that it is made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

# Those that are known to make each element of the corresponding ones: a list of others would have
# holes, and what is wrongly refused can say so (`hiso_jax.rules.Rule.elementwise`).
ELEMENTWISE = set(
    """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type cbrt ceil clamp clz convert_element_type copy copy_p cos cosh digamma div eq
erf erf_inv erfc exp exp2 expm1 expand_dims floor ge gt igamma igammac integer_pow is_finite le
lgamma log log1p logistic lt max min mul name ne neg nextafter not or polygamma population_count
pow reduce_precision regularized_incomplete_beta rem reshape round rsqrt select_n shift_left
shift_right_arithmetic shift_right_logical sign sin sinh sqrt square squeeze stop_gradient sub tan
tanh xor zeta
""".split()
)
APART = {"optimization_barrier", "debug_callback", "debug_print"}
"""Give back every array as it is, or nothing."""
CALLS = {"jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint",
         "custom_jvp_call", "custom_vjp_call", "cond", "while", "scan"}  # fmt: skip
"""Whose own operations are looked at."""


def mixing(size: int, function: Callable[..., Any], *args: Any) -> str | None:
    """The name of an operation by which elements of large arguments may mix, or None.

    Nothing is computed. Of arrays of at least `size` elements only others of the same size may be
    made, and those only of them and of single numbers, by operations that are known to work
    element by element, wherever elements stand. What is smaller was never made of them.

    Args:
      size: elements of a large argument.
      function: of pytrees of arrays.
      *args: arrays, or their shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones(7)
      >>> mixing(7, lambda x: x * 2, x), mixing(7, lambda x: x / x.sum(), x)
      (None, 'reduce_sum')
    """
    for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr):
        name, of = equation.primitive.name, equation.params
        taken, made = (
            [_size(x.aval) for x in side] for side in (equation.invars, equation.outvars)
        )
        if name in CALLS:
            if name != "scan":
                continue
            # Row by row: all rows are of one array, and a row may go into the next one.
            kept = of["num_carry"]
            taken, made = taken[of["num_consts"] + kept :], made[kept:]
        if max([0, *taken, *made]) < size or name in APART:
            continue
        # One number may be spread; several would be where their places say.
        known = name in ELEMENTWISE or (name == "broadcast_in_dim" and taken[0] in (1, made[0]))
        if not known or any(x != made[0] for x in (*taken, *made) if x != 1):
            return name
    return None


def _size(aval: Any) -> int:
    return getattr(aval, "size", 1)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Operations, and those inside calls, loops and conditions."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name not in CALLS:
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from _equations(inner)
