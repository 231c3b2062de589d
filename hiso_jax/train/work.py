"""What a computation costs: the multiplications of its matrix products and convolutions."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def multiplications(function: Callable[..., Any], *arguments: Any) -> int:
    """Count them in the program of ``function(*arguments)``, loops as often as they turn.

    Of a ``while`` one turn is counted, since how many there are is not known before.

    Args:
      function: pure.
      arguments: arrays, or only their shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> turn = lambda x, w: (jnp.tanh(x @ w), None)
      >>> layers = lambda x, w: jax.lax.scan(turn, x, w)[0]
      >>> multiplications(layers, jnp.ones(4), jnp.ones((6, 4, 4)))
      96
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += out * math.prod(shape[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            channels = equation.params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(kernel) // kernel[channels]
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            total += turns * _of(inner)
    return total
