"""The vision transformer (ViT, arXiv 2010.11929) in flax.nnx, as Hugging Face names its tensors.

Names are those of the files on the hub, which transformers 5 turns into others of its own.
Layers are stacked ([L, ...] leaves) and scanned.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hiso_jax._engine import lazy
from hiso_jax.models import attention, inputs
from hiso_jax.models.layers import layer_norm, stack_of


def sides(size: Any) -> tuple[int, int]:
    """Height and width of what a config gives as one number or as two.

    Example:
      >>> sides(224), sides([16, 8])
      ((224, 224), (16, 8))
    """
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


class _Patches(nnx.Module):
    """A convolution whose windows do not overlap; its kernel [D, C, h, w] is torch's."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.size = sides(config.patch_size)
        shape = (config.hidden_size, config.num_channels, *self.size)
        self.projection: Any = nnx.Module()
        self.projection.weight = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))
        self.projection.bias = nnx.Param(jnp.zeros(config.hidden_size))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        kernel = jnp.asarray(self.projection.weight.get_value())
        kind = ("NHWC", "OIHW", "NHWC")
        x = jax.lax.conv_general_dilated(
            pixels.astype(kernel.dtype), kernel, self.size, "VALID", dimension_numbers=kind
        )
        return x.reshape(len(x), -1, x.shape[-1]) + self.projection.bias[...][None, None]


class _Embeddings(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        (high, wide), patch = sides(config.image_size), sides(config.patch_size)
        count = (high // patch[0]) * (wide // patch[1])
        self.cls_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position_embeddings = nnx.Param(jnp.zeros((1, count + 1, width)))
        self.patch_embeddings = _Patches(config, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embeddings(pixels)
        first = jnp.broadcast_to(self.cls_token[...], (len(pixels), 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], 1) + self.position_embeddings[...]


class _SelfAttention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads, own = config.num_attention_heads, dict(use_bias=config.qkv_bias)
        self.query = nnx.Linear(width, width, rngs=rngs, **own)
        self.key = nnx.Linear(width, width, rngs=rngs, **own)
        self.value = nnx.Linear(width, width, rngs=rngs, **own)

    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (part(x).reshape(split) for part in (self.query, self.key, self.value))
        return attention.attend(q, k, v).reshape(x.shape)


class _Dense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.dense = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(x)


class _Attention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.attention = _SelfAttention(config, rngs)
        self.output = _Dense(config.hidden_size, config.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(self.attention(x))


class _Layer(nnx.Module):
    """Pre-norm, unlike BERT's."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        width, inner, epsilon = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = _Attention(config, rngs)
        self.intermediate = _Dense(width, inner, rngs)
        self.output = _Dense(inner, width, rngs)
        self.layernorm_before = layer_norm(width, epsilon, rngs)
        self.layernorm_after = layer_norm(width, epsilon, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.layernorm_before(x))
        inner = jax.nn.gelu(self.intermediate(self.layernorm_after(x)), approximate=False)
        return x + self.output(inner)


class _Encoder(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.layer = stack_of(_Layer, config, rngs)

    def __call__(self, x: jax.Array, begin: int = 0, end: int | None = None) -> jax.Array:
        graph, stacked = nnx.split(self.layer)
        step = lambda x, inputs: (nnx.merge(graph, inputs[0])(x), None)  # noqa: E731
        return lazy.scan(step, x, stacked, begin=begin, end=end)[0]


def _check(config: Any) -> None:
    """Refuse what a config may ask for and no tensor shows."""
    if config.hidden_act != "gelu":
        raise ValueError(f"config: hidden_act {config.hidden_act!r} is not supported, only 'gelu'")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"config: hidden_size {config.hidden_size} is no multiple of "
                         f"num_attention_heads {config.num_attention_heads}")  # fmt: skip


class ViT(nnx.Module):
    """ViT: pixels in, logits out; without a head of its own, hidden states.

    Args:
      config: a transformers config of model type ``vit``.
      rngs: for random weights.
      headed: whether it has a classifier.

    Raises:
      ValueError: something that a config may ask for is not supported.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs, headed: bool = True):
        _check(config)
        self.config = config
        self.vit: Any = nnx.Module()
        self.vit.embeddings = _Embeddings(config, rngs)
        self.vit.encoder = _Encoder(config, rngs)
        self.vit.layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        if headed:
            self.classifier = nnx.Linear(config.hidden_size, config.num_labels, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Logits float32 [B, labels] of pixels [B, H, W, C], normalized as the model was trained.

        Without a head: hidden states [B, T, D].

        Raises:
          ValueError: images of another size, or with other channels.
        """
        hidden = self.hidden(pixels)
        return self.head(hidden) if hasattr(self, "classifier") else hidden

    def hidden(self, pixels: Any, stream: Any = None, begin: int = 0) -> jax.Array:
        """States [B, T, D], of the image first and then of its patches row by row.

        With a `stream`, which `lower` gave, from layer `begin` on.
        """
        inputs.check_layers(self.config, stream, begin)
        x = self._embedded(pixels) if stream is None else stream
        return self.vit.layernorm(self.vit.encoder(x, begin))

    def lower(self, pixels: Any, end: int, stream: Any = None, begin: int = 0) -> jax.Array:
        """Input [B, T, D] of layer `end`: all below it, or from the input of layer `begin` on."""
        inputs.check_layers(self.config, stream, begin, end)
        return self.vit.encoder(self._embedded(pixels) if stream is None else stream, begin, end)

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits float32 [B, labels] of hidden states [B, T, D].

        Raises:
          ValueError: the checkpoint came without a classifier.
        """
        if not hasattr(self, "classifier"):
            raise ValueError("head: this ViT came without a classifier")
        return self.classifier(hidden[:, 0]).astype(jnp.float32)

    def _embedded(self, pixels: Any) -> jax.Array:
        wanted = (*sides(self.config.image_size), self.config.num_channels)
        if jnp.ndim(pixels) != 4 or jnp.shape(pixels)[1:] != wanted:
            expected = ", ".join(map(str, wanted))
            raise ValueError(
                f"pixels: expected shape [B, {expected}], the model's image_size and num_channels, "
                f"got {list(jnp.shape(pixels))}"
            )
        return self.vit.embeddings(jnp.asarray(pixels))
