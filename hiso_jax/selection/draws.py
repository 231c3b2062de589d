"""Examples drawn at random, by class, by a score or in proportion to one; checks of input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import checks


def generator(key: jax.Array) -> np.random.Generator:
    """Random numbers of a key."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return np.random.default_rng(np.asarray(data).ravel().tolist())


def checked(
    features: Any, budget: int, weights: Any = None, wanted: str | None = "none"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features as float32 [N, D] and weights as float64 [N].

    Args:
      features: as given.
      budget: as given.
      weights: as given.
      wanted: ``"none"``; ``"optional"``; or what they are, if there have to be some.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features: expected [N, D] with N >= 1, got {features.shape}")
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(1))
        raise ValueError(f"features: NaN or infinite in {len(bad)} of {len(features)} examples, "
                         f"the first is {bad[0]}")  # fmt: skip
    if checks.count("budget", budget) > len(features):
        raise ValueError(f"budget: expected at most {len(features)}, one an example, got {budget}")
    if weights is None:
        if wanted not in ("none", "optional"):
            raise ValueError(f"weights: expected {wanted}, got None")
        return features, None
    if wanted == "none":
        raise ValueError("weights: expected None, this function looks at none")
    weights = np.asarray(weights, np.float64)
    if weights.shape != features.shape[:1] or not np.isfinite(weights).all():
        raise ValueError(f"weights: expected {len(features)} finite numbers, one an example, got "
                         f"{weights.shape} with {np.isfinite(weights).sum()} finite")  # fmt: skip
    return features, weights


def positive(weights: np.ndarray | None, count: int) -> np.ndarray:
    """Weights that are >= 0 and not all 0, of mean 1."""
    if weights is None:
        return np.ones(count)
    if (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"weights: expected numbers >= 0 with a sum > 0, got {weights.min():g} to "
                         f"{weights.max():g}")  # fmt: skip
    return weights / weights.mean()


def uniform(features: Any, budget: int, key: jax.Array, weights: None = None) -> np.ndarray:
    """Draw without repetition, all alike; features give no more than their number.

    Example:
      >>> len(set(uniform(np.zeros((9, 1)), 9, jax.random.key(0)).tolist()))
      9
    """
    features, _ = checked(features, budget, weights)
    return generator(key).permutation(len(features))[:budget]


def balanced(
    features: Any, budget: int, key: jax.Array, weights: None = None, *, labels: Any
) -> np.ndarray:
    """Draw without repetition as many of each class, as far as it has so many.

    Args:
      features: [N, D]; only their number counts.
      budget: B.
      key: of the draw.
      weights: none.
      labels: [N], the class of each.

    Example:
      >>> labels = np.array([0] * 97 + [1] * 3)
      >>> picks = balanced(np.zeros((100, 1)), 8, jax.random.key(0), labels=labels)
      >>> np.bincount(labels[picks]).tolist()
      [5, 3]
    """
    features, _ = checked(features, budget, weights)
    labels = np.asarray(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels: expected {len(features)}, one an example, got {labels.shape}")
    order = generator(key).permutation(len(features))
    turn = np.zeros(len(features), np.int64)  # how many of its class come before it
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    return order[np.argsort(turn[order], kind="stable")][:budget]


def by_score(features: Any, budget: int, key: jax.Array, weights: Any = None) -> np.ndarray:
    """Take the examples with the highest weights: losses, say, or another of `scores`.

    Ties are broken at random.

    Example:
      >>> by_score(np.zeros((4, 1)), 2, jax.random.key(0), [0.1, 3.0, 0.2, 5.0]).tolist()
      [3, 1]
    """
    features, weights = checked(features, budget, weights, "a score for each example")
    assert weights is not None
    order = generator(key).permutation(len(features))
    return order[np.argsort(-weights[order], kind="stable")][:budget]


def importance(
    features: Any, budget: int, key: jax.Array, weights: Any = None, *, share: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Draw with repetition, p_i in proportion to the size of `weights`; and what undoes the bias.

    The mean of ``w_i x_i`` over what is drawn, with ``w_i = 1 / (N p_i)``, has the mean of x over
    all examples as its expectation, whatever p. Its variance is least for p in proportion to
    ``|x|``: take for `weights` each example's own scalar along a direction.

    Args:
      features: [N, D]; only their number counts.
      budget: B.
      key: of the draw.
      weights: [N], of any sign.
      share: in [0, 1], of the draws that are uniform; no w_i is above 1 / share.

    Returns:
      Indices [B], and w_i of each as float32 [B].

    Example:
      >>> picks, w = importance(np.zeros((2, 1)), 1, jax.random.key(0), [9.0, 0.0], share=0.5)
      >>> {0: 0.67, 1: 2.0}[int(picks[0])] == round(float(w[0]), 2)
      True
    """
    features, weights = checked(features, budget, weights, "a scalar for each example")
    assert weights is not None
    checks.number("share", share, 0, 1)
    size = np.abs(weights)
    if not size.sum():  # there is nothing to tell them apart by
        size = np.ones(len(size))
    chances = (1 - share) * size / size.sum() + share / len(size)
    picks = generator(key).choice(len(size), budget, p=chances / chances.sum())
    return picks, (1 / (len(size) * chances[picks])).astype(np.float32)
