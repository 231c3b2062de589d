"""How much a run gives away about a client: scalars on a grid, noise, and what it adds up to.

Example:
  >>> import numpy as np
  >>> from hiso_jax import privacy
  >>> privacy.Grid(step=0.25).encode(np.array([[1.5, -0.5]])).tolist()
  [6, -2, 1]
"""

from hiso_jax._engine import renamed
from hiso_jax.privacy.fixed import Grid, clip
from hiso_jax.privacy.local import epsilon, privatize

__all__ = ["Grid", "clip", "epsilon", "privatize"]

__getattr__ = renamed.functions(globals(), privatise="privatize")
