"""The encoder of BERT and RoBERTa in flax.nnx, named as Hugging Face names its tensors.

Layers are stacked ([L, ...] leaves) and scanned, so a deep model compiles as fast as a
shallow one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hiso_jax._engine import lazy
from hiso_jax.models import attention, inputs
from hiso_jax.models.layers import layer_norm, stack_of


class _Embeddings(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.LayerNorm = layer_norm(width, config.layer_norm_eps, rngs)
        # RoBERTa counts tokens only, and begins after the place of its padding.
        self.first = config.pad_token_id + 1 if config.model_type == "roberta" else None

    def __call__(self, input_ids: jax.Array, valid: jax.Array) -> jax.Array:
        table = self.word_embeddings.embedding.get_value()
        # Columns beyond the table's end can only be padding; they are to give numbers as well.
        last = self.position_embeddings.num_embeddings - 1
        positions: Any = np.minimum(np.arange(input_ids.shape[1]), last)[None]
        if self.first is not None:
            positions = self.first - 1 + jnp.cumsum(valid, 1) * valid
        return self.LayerNorm(
            lazy.take(table, inputs.safe(input_ids, valid, table.shape[0]))
            + self.position_embeddings(positions)
            + self.token_type_embeddings(jnp.zeros_like(positions))
        )


class _Dense(nnx.Module):
    """`dense` into the residual stream, then `LayerNorm`: BERT is post-norm."""

    def __init__(self, inputs: int, config: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(inputs, config.hidden_size, rngs=rngs)
        self.LayerNorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        return self.LayerNorm(self.dense(x) + residual)


class _SelfAttention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        q, k, v = (part(x).reshape(split) for part in (self.query, self.key, self.value))
        return attention.attend(q, k, v, mask).reshape(x.shape)


class _Attention(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.self = _SelfAttention(config, rngs)
        self.output = _Dense(config.hidden_size, config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return self.output(self.self(x, mask), x)


class _Intermediate(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.dense = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.dense(x), approximate=False)


class _Layer(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.attention = _Attention(config, rngs)
        self.intermediate = _Intermediate(config, rngs)
        self.output = _Dense(config.intermediate_size, config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class _Encoder(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.layer = stack_of(_Layer, config, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, begin: int = 0, end: int | None = None
    ) -> jax.Array:
        graph, stacked = nnx.split(self.layer)
        step = lambda x, inputs: (nnx.merge(graph, inputs[0])(x, mask), None)  # noqa: E731
        return lazy.scan(step, x, stacked, begin=begin, end=end)[0]


class _Transform(nnx.Module):
    def __init__(self, config: Any, norm: str, rngs: nnx.Rngs):
        width = config.hidden_size
        self.dense = nnx.Linear(width, width, rngs=rngs)
        setattr(self, norm, layer_norm(width, config.layer_norm_eps, rngs))
        self.norm = norm

    def __call__(self, x: jax.Array) -> jax.Array:
        return getattr(self, self.norm)(jax.nn.gelu(self.dense(x), approximate=False))


def has_head(config: Any) -> bool:
    """Whether a config names a class with the masked-language-model head.

    Of a checkpoint its tensors tell, see `hiso_jax.models.Model.has_head`.
    """
    return any(name.endswith("ForMaskedLM") for name in config.architectures or ())


def _check(config: Any) -> None:
    """Refuse what a config may ask for and no tensor shows."""
    if config.hidden_act != "gelu":
        raise ValueError(f"config: hidden_act {config.hidden_act!r} is not supported, only 'gelu'")
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"config: {name} is not supported, the model is an encoder")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(
            f"config: position_embedding_type {kind!r} is not supported, only 'absolute'"
        )
    if config.model_type == "roberta" and config.pad_token_id is None:
        raise ValueError("config: RoBERTa needs pad_token_id, its positions begin after it")


class Bert(nnx.Module):
    """BERT or RoBERTa without pooler: tokens in, hidden states out; a head if it has one.

    Args:
      config: a transformers config of model type ``bert`` or ``roberta``.
      rngs: for random weights.
      headed: whether it has a masked-language-model head; by default as `has_head`.

    Raises:
      ValueError: something that a config may ask for is not supported.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs, headed: bool | None = None):
        _check(config)
        self.config = config
        self.embeddings = _Embeddings(config, rngs)
        self.encoder = _Encoder(config, rngs)
        self.roberta = config.model_type == "roberta"
        if has_head(config) if headed is None else headed:
            bias = nnx.Param(jnp.zeros(config.vocab_size))
            if self.roberta:
                self.lm_head: Any = _Transform(config, "layer_norm", rngs)
                self.lm_head.bias = bias
            else:
                self.cls: Any = nnx.Module()
                predictions: Any = nnx.Module()
                predictions.transform = _Transform(config, "LayerNorm", rngs)
                predictions.bias = bias
                self.cls.predictions = predictions

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Encode a padded batch.

        Args:
          input_ids: int32 [B, T].
          attention_mask: [B, T], 1 for a token, 0 for padding.

        Returns:
          float32 [B, T, D]; positions that are padding hold no meaning.
        """
        return self.hidden(input_ids, attention_mask)

    def hidden(
        self, input_ids: jax.Array, attention_mask: jax.Array, stream: Any = None, begin: int = 0
    ) -> jax.Array:
        """The same; with a `stream`, which `lower` gave, from layer `begin` on."""
        inputs.check_layers(self.config, stream, begin)
        ids, attention_mask = inputs.check(self.config, input_ids, attention_mask)
        valid = attention_mask > 0
        mask = valid[:, None, None, :]
        if stream is not None:
            return self.encoder(stream, mask, begin)
        return self.encoder(self.embeddings(ids, valid), mask)

    def lower(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        end: int,
        stream: Any = None,
        begin: int = 0,
    ) -> jax.Array:
        """Input [B, T, D] of layer `end`: all below it, or from the input of layer `begin` on."""
        inputs.check_layers(self.config, stream, begin, end)
        ids, attention_mask = inputs.check(self.config, input_ids, attention_mask)
        valid = attention_mask > 0
        x = self.embeddings(ids, valid) if stream is None else stream
        return self.encoder(x, valid[:, None, None, :], begin, end)

    def head(self, hidden: jax.Array, rows: Any = None) -> jax.Array:
        """Logits float32 [..., V] of hidden states [..., D], or those of the tokens `rows`.

        Raises:
          ValueError: the checkpoint came without a masked-language-model head.
        """
        if not (hasattr(self, "lm_head") or hasattr(self, "cls")):
            raise ValueError("head: this encoder came without a masked-language-model head")
        transform = self.lm_head if self.roberta else self.cls.predictions.transform
        bias = (self.lm_head if self.roberta else self.cls.predictions).bias[...]
        table = self.embeddings.word_embeddings.embedding
        if rows is None:
            table = table[...]
        else:
            table, bias = lazy.take(table.get_value(), rows), bias[rows]
        logits = transform(hidden) @ table.T
        return (logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))).astype(jnp.float32)
