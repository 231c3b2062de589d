"""Which examples to learn from: pure functions from features to the numbers of a few of them.

Each is ``(features [N, D], budget, key, weights=None) -> indices [budget]`` with indices int64,
in the order of choice, the same for the same key. Features are float; what a function makes of
`weights` [N], if it takes any, is in its docstring. None needs a gradient of the model: what is
optimized, by optax, are `budget` points among the features.

Every function raises ValueError for features that are not [N, D], NaN or infinite, for a budget
that is not from 1 to N, and for weights that do not fit.

Example:
  >>> import jax, numpy as np
  >>> from hiso_jax import selection
  >>> features = np.random.default_rng(0).normal(size=(100, 8))
  >>> selection.k_center(features, 10, jax.random.key(0)).shape
  (10,)
"""

from hiso_jax.selection.centers import active_ft, vecaf
from hiso_jax.selection.cover import k_center, k_means
from hiso_jax.selection.draws import balanced, by_score, importance, uniform
from hiso_jax.selection.scores import augment, scores

__all__ = [
    "active_ft",
    "augment",
    "balanced",
    "by_score",
    "importance",
    "k_center",
    "k_means",
    "scores",
    "uniform",
    "vecaf",
]
