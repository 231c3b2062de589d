"""What examples are worth by the predictions of a model, and features moved towards texts."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hiso_jax._engine import checks


def scores(logits: Any, labels: Any) -> dict[str, jax.Array]:
    """What makes an example worth learning from, by its logits: the higher, the more.

    Args:
      logits: [N, classes].
      labels: int [N].

    Returns:
      ``loss``, the cross-entropy; ``entropy`` of the prediction; ``margin``, the second highest
      probability less the highest; ``el2n``, the length of prediction less label (arXiv
      2107.07075). Each [N], float32.

    Example:
      >>> found = scores(jnp.zeros((1, 2)), jnp.array([1]))
      >>> {name: round(float(x[0]), 3) for name, x in found.items()}
      {'loss': 0.693, 'entropy': 0.693, 'margin': 0.0, 'el2n': 0.707}
    """
    log = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    p = jnp.exp(log)
    wanted = jax.nn.one_hot(labels, p.shape[-1])
    top = lax.top_k(p, min(2, p.shape[-1]))[0]
    return {
        "loss": -jnp.take_along_axis(log, jnp.asarray(labels)[:, None], 1)[:, 0],
        "entropy": -(p * log).sum(-1),
        "margin": top[:, -1] - top[:, 0],
        "el2n": jnp.linalg.norm(p - wanted, axis=-1),
    }


def augment(
    features: Any, texts: Any, eta: float, attention: Literal["pool", "one"] = "pool"
) -> np.ndarray:
    """Move features towards texts that describe them: VeCAF's ``e - eta a (e - t)``.

    Args:
      features: [N, D].
      texts: [N, D], in the same space.
      eta: how far.
      attention: ``"pool"``: a is the softmax of the distances ``|e - t|`` over the examples, times
        N, so that it is 1 in the mean; ``"one"``: a is 1, as in the published code, whose softmax
        is over a single number.

    Returns:
      float32 [N, D].

    Example:
      >>> augment([[0.0, 1.0]], [[1.0, 1.0]], 0.25).tolist()
      [[0.25, 1.0]]
    """
    e, t = np.asarray(features, np.float32), np.asarray(texts, np.float32)
    if e.ndim != 2 or e.shape != t.shape or not (np.isfinite(e).all() and np.isfinite(t).all()):
        raise ValueError(f"texts: expected finite numbers, as many as features {e.shape}, got "
                         f"{t.shape}")  # fmt: skip
    checks.number("eta", eta)
    checks.choice("attention", attention, ("pool", "one"))
    away = np.linalg.norm(e - t, axis=1, keepdims=True)
    share = np.exp(away - away.max())
    share = share / share.mean() if attention == "pool" else np.ones_like(away)
    return e - np.float32(eta) * share * (e - t)
