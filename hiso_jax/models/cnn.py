"""Small convolutional networks, trained from scratch."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The initializer of flax, drawn flat: the same numbers, for a quarter of the compile time."""
    drawn = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype).reshape(shape)
    # Cut off at two, a standard normal number has this standard deviation.
    return drawn * (jnp.sqrt(jnp.array(1 / math.prod(shape[:-1]), dtype)) / 0.87962566103423978)


class Network(nnx.Module):
    """Layers one after the other, a ReLU between them; `names` are theirs."""

    names: tuple[str, ...]

    def __call__(self, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        """Layers `begin` to `end`, by default all: images [B, H, W, C] to logits [B, labels]."""
        for name in self.names[begin:end]:
            layer = getattr(self, name)
            x = layer(x if isinstance(layer, nnx.Conv) else x.reshape(x.shape[0], -1))
            x = x if name == self.names[-1] else nnx.relu(x)
        return x


class Cnn(Network):
    """Two convolutions and two dense layers; for 28 x 28 gray images 29,083 parameters.

    Args:
      rngs: for the first weights.
      size: height and width of the images.
      channels: of the images.
      labels: how many.

    Example:
      >>> Cnn(nnx.Rngs(0))(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """

    names = ("first", "second", "hidden", "dense")

    def __init__(self, rngs: nnx.Rngs, size: int = 28, channels: int = 1, labels: int = 10):
        own: Any = dict(kernel_init=lecun_normal, rngs=rngs)
        self.first = nnx.Conv(channels, 8, (3, 3), strides=2, **own)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, **own)
        self.hidden = nnx.Linear(16 * math.ceil(size / 4) ** 2, 35, **own)
        self.dense = nnx.Linear(35, labels, **own)
