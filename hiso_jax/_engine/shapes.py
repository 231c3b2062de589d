"""Shapes in types: ``Float[Array, "C K P"]`` is a float array of three axes.

A reader and a type checker see ``Annotated``. Where jaxtyping was imported before hiso_jax, as
`tests/test_shapes.py` does, its own types stand here, and its hook checks every call.

Axes: R rounds, C clients, K local steps, P directions or what a client sends along them, S scalars
of a local step in a record, N numbers of a run of elements.
"""

import sys
from typing import TYPE_CHECKING

import numpy as np
from jax import Array
from jax.typing import ArrayLike

if TYPE_CHECKING or "jaxtyping" not in sys.modules:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Integer
    from typing import Annotated as Key
    from typing import Annotated as Real
    from typing import Annotated as UInt32
else:
    from jaxtyping import Bool, Float, Integer, Key, Real, UInt32

__all__ = ["Array", "ArrayLike", "Bool", "Float", "Index", "Integer", "Key", "Number", "Real",
           "Shape", "SomeKey", "Start", "UInt32"]  # fmt: skip

Shape = tuple[int, ...]
Index = Integer[Array, ""] | int | np.integer
"""A whole number, which may be traced."""
Start = Integer[Array, "..."] | int | np.integer
"""Number of the first element of a run, or of several runs."""
Number = Real[Array, ""] | float | int | np.floating
"""A real number, which may be traced."""
SomeKey = Key[Array, ""] | UInt32[Array, "2"]
"""A PRNG key, or the two words of an old-style one."""
