"""Bad input at the door: what was given, what is wanted, which argument."""

import math
import operator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` can be looked at now (they cannot inside jit)."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))


def count(name: str, value: Any) -> int:
    """Return a whole number >= 1 as int."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}: must be known before compiling, got a traced value; under "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise TypeError(f"{name}: expected an int >= 1, got {value!r}")
    if whole < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {whole}")
    return whole


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> Any:
    """Return a real number in [low, high] (or (low, high] if `above`); traced values pass."""
    if isinstance(value, Tracer):
        return value
    if isinstance(value, (bool, str)) or np.ndim(value) or not np.isrealobj(value):
        raise TypeError(f"{name}: expected a real number, got {value!r}")
    try:
        real = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a real number, got {value!r}") from None
    wanted = f"{'>' if above else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    if not math.isfinite(real) or real > high or real < low or (above and real == low):
        raise ValueError(f"{name}: expected a finite number {wanted}, got {value!r}")
    return value


def choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    return value
