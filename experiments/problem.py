"""What a job trains: parameters, a loss, clients and the data to evaluate on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax.simulation import Arrays, Clients


class Problem(NamedTuple):
    """A classification problem over simulated clients."""

    name: str
    params: Any
    logits_fn: Callable[[Any, Any], jax.Array]  # (params, batch) -> [B, classes]
    clients: Clients  # columns of `logits_fn`'s batch and "label"
    dev: Arrays  # chosen on
    test: Arrays  # reported
    save: Callable[[Path, Any], None]  # (run folder, params)

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        """Mean cross-entropy over the examples of a batch that are not padding."""
        losses, weight = self._losses(params, batch)[0], batch["weight"]
        return (losses * weight).sum() / weight.sum()

    def score(self, params: Any, batch: Any) -> dict[str, jax.Array]:
        """Sums over a batch: ``loss``, ``correct`` and ``count``."""
        losses, logits = self._losses(params, batch)
        weight = batch["weight"]
        correct = (logits.argmax(-1) == batch["label"]) * weight
        return {"loss": (losses * weight).sum(), "correct": correct.sum(), "count": weight.sum()}

    def _losses(self, params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits = self.logits_fn(params, batch).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, batch["label"][..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - picked, logits


def split(size: int, seed: int, parts: tuple[float, ...] = (0.7, 0.15, 0.15)) -> list[np.ndarray]:
    """Split the numbers below `size` at random into train, dev and test."""
    order = np.random.default_rng([seed, size]).permutation(size)
    ends = (np.cumsum(parts)[:-1] * size).astype(int)
    return [np.sort(part) for part in np.split(order, ends)]
