"""Whether a function of arrays works element by element, by the operations that it is made of."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

MIXING = {"sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "transpose",
          "fft", "triangular_solve", "eigh", "qr", "svd", "lu", "cholesky"}  # fmt: skip
"""Operations whose result may have the shape of what it is made of, and mixes its elements."""


def mixing(function: Callable[..., Any], *args: Any) -> str | None:
    """The name of an operation by which elements of the largest argument mix, or None.

    Nothing is computed. An operation mixes if it makes a smaller or larger array of one of that
    size, unless it is a loop, a call or a condition, whose own operations are then looked at.

    Args:
      function: of pytrees of arrays.
      *args: arrays, or their shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> mixing(lambda x: x * 2, jnp.ones(7)), mixing(lambda x: x / x.sum(), jnp.ones(7))
      (None, 'reduce_sum')
    """
    size = max(x.size for x in jax.tree.leaves(args))
    for equation in _equations(jax.make_jaxpr(function)(*args).jaxpr):
        taken, made = ([x.aval for x in side] for side in (equation.invars, equation.outvars))
        if not any(_size(x) >= size for x in taken):
            continue
        name = equation.primitive.name
        if name in MIXING or any(_size(x) != size for x in made):
            return name
    return None


def _size(aval: Any) -> int:
    return getattr(aval, "size", 1)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Operations, also those inside others, but not those that have some inside."""
    for equation in jaxpr.eqns:
        values = [
            x for v in equation.params.values() for x in (v if isinstance(v, tuple) else (v,))
        ]
        inner = [getattr(x, "jaxpr", x) for x in values]
        inner = [x for x in inner if hasattr(x, "eqns")]
        if not inner:
            yield equation
        for own in inner:
            yield from _equations(own)
