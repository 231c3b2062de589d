"""Examples that cover all others: k-center and k-means."""

from typing import Any

import jax
import numpy as np

from hiso_jax.selection.draws import checked, generator, positive


def distances(features: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Squared distances [N, B] of features [N, D] to points [B, D], float64."""
    x, y = np.asarray(features, np.float64), np.asarray(points, np.float64)
    return ((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T).clip(0)


def k_center(features: Any, budget: int, key: jax.Array, weights: Any = None) -> np.ndarray:
    """Take whichever example is farthest from those taken, again and again, from a random one on.

    The greatest distance of an example to its nearest taken one is at most twice the least
    possible (Gonzalez 1985; Core-set, arXiv 1708.00489).

    Args:
      features: [N, D].
      budget: B.
      key: of the first one.
      weights: >= 0, what distances of each example are multiplied by; by default 1.

    Example:
      >>> sorted(k_center([[0.0], [0.1], [5.0], [9.0]], 3, jax.random.key(0)).tolist())[1:]
      [2, 3]
    """
    features, weights = checked(features, budget, weights, "optional")
    scale = positive(weights, len(features)) ** 2
    picks = [int(generator(key).integers(len(features)))]
    away = np.full(len(features), np.inf)
    for _ in range(budget - 1):
        away = np.minimum(away, distances(features, features[picks[-1:]])[:, 0])
        away[picks] = -1  # of examples that are all alike, none is taken twice
        picks.append(int(np.argmax(np.where(away < 0, -1, away * scale))))
    return np.array(picks)


def lloyd(
    features: np.ndarray, centers: np.ndarray, weights: np.ndarray, steps: int = 100
) -> np.ndarray:
    """Lloyd's algorithm: move centers [B, D] to the weighted means of what is nearest to them.

    Until nothing moves, or for `steps`. A center that nothing is nearest to stays.

    Example:
      >>> lloyd(np.array([[0.0], [2.0], [9.0]]), np.array([[0.0], [8.0]]), np.ones(3)).tolist()
      [[1.0], [9.0]]
    """
    x, centers = np.asarray(features, np.float64), np.asarray(centers, np.float64)
    for _ in range(steps):
        near = np.argmin(distances(x, centers), 1)
        own = np.zeros((len(centers), len(x)))
        own[near, np.arange(len(x))] = weights
        total = own.sum(1, keepdims=True)
        moved = np.where(total > 0, own @ x / np.where(total > 0, total, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers


def k_means(features: Any, budget: int, key: jax.Array, weights: Any = None) -> np.ndarray:
    """Take the examples nearest to the centers of k-means, which begins by k-means++.

    Args:
      features: [N, D].
      budget: B.
      key: of the first centers (Arthur and Vassilvitskii 2007).
      weights: >= 0, of each example in the sum of squares; losses, say (Axiotis et al., ICML 2024).

    Example:
      >>> sorted(k_means([[0.0], [1.0], [2.0], [9.0]], 2, jax.random.key(0)).tolist())
      [1, 3]
    """
    features, weights = checked(features, budget, weights, "optional")
    own, rng = positive(weights, len(features)), generator(key)
    picks, away = [int(rng.choice(len(own), p=own / own.sum()))], np.full(len(own), np.inf)
    for _ in range(budget - 1):
        away = np.minimum(away, distances(features, features[picks[-1:]])[:, 0])
        away[picks[-1]] = 0
        chance = away * own
        left = np.setdiff1d(np.arange(len(own)), picks)  # all that are left may be alike
        last = rng.choice(len(own), p=chance / chance.sum()) if chance.sum() else rng.choice(left)
        picks.append(int(last))
    centers = lloyd(features, features[picks], own)
    return nearest(-distances(features, centers))


def nearest(similarity: np.ndarray) -> np.ndarray:
    """Give each column, one after the other, the row most like it that is not taken yet.

    Example:
      >>> nearest(np.array([[0.9, 0.8], [0.1, 0.2]])).tolist()
      [0, 1]
    """
    similarity, picks = np.array(similarity, np.float64), []
    for column in range(similarity.shape[1]):
        picks.append(int(np.argmax(similarity[:, column])))
        similarity[picks[-1]] = -np.inf
    return np.array(picks)
