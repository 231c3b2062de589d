"""Decoders in flax.nnx, attributes named as Hugging Face names its tensors.

One loop over layers (`hiso_jax.models.layers`) for all: OPT (pre- and post-norm, projections),
and the Llama family (Llama, Qwen2, Qwen3, Gemma 3 text, SmolLM3), whose members differ by config.
Layers are stacked ([L, ...] leaves) and scanned, so a deep model compiles as fast as a
shallow one; what differs between layers (rotary frequencies, window) is scanned with them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hiso_jax._engine import checks, lazy
from hiso_jax.models import attention, inputs
from hiso_jax.models.layers import LlamaLayer, OptLayer, RMSNorm, Step, opt_norm, stack_of


class Cache(NamedTuple):
    """Keys and values of the tokens so far, S slots."""

    keys: jax.Array  # [L, B, S, kv heads, head width]
    values: jax.Array  # as keys
    positions: jax.Array  # int32 [B, S]: of the token in each slot
    valid: jax.Array  # bool [B, S]


class _Body(nnx.Module):
    """Everything but the head; `decoder` inside `model` for OPT, `model` itself for others."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.opt = config.model_type == "opt"
        _check(config)
        make = OptLayer if self.opt else LlamaLayer
        width = config.word_embed_proj_dim if self.opt else config.hidden_size
        self.embed_tokens = nnx.Embed(config.vocab_size, width, rngs=rngs)
        if self.opt:
            places = config.max_position_embeddings + 2
            self.embed_positions = nnx.Embed(places, config.hidden_size, rngs=rngs)
            if width != config.hidden_size:
                self.project_in = nnx.Linear(width, config.hidden_size, use_bias=False, rngs=rngs)
                self.project_out = nnx.Linear(config.hidden_size, width, use_bias=False, rngs=rngs)
            if config.do_layer_norm_before and not config._remove_final_layer_norm:
                self.final_layer_norm = opt_norm(config, rngs)
        else:
            offset = int(config.model_type == "gemma3_text")
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset)

        self.layers = stack_of(make, config, rngs)
        self.scale = config.hidden_size**0.5 if config.model_type == "gemma3_text" else None
        self.config = config

    def embed(self, input_ids: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """Input [B, T, D] of the first layer."""
        table = self.embed_tokens.embedding.get_value()
        x = lazy.take(table, inputs.safe(input_ids, valid, table.shape[0]))
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.opt:
            if hasattr(self, "project_in"):
                x = self.project_in(x)
            # Padding is at position -1, as in the checkpoints' own code.
            places = jnp.where(valid, positions, -1) + 2
            x = x + lazy.take(self.embed_positions.embedding.get_value(), places)
        return x

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        cache: Any = None,
        slot: Any = None,
        begin: int = 0,
        end: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return hidden states [B, T, D] and the cache with these tokens in it.

        From the input of layer `begin`; or the input of layer `end`, if it is given.
        """
        keys, kept = (positions, valid), None
        if cache is not None:
            put = jax.lax.dynamic_update_slice_in_dim
            keys = (put(cache.positions, positions, slot, 1), put(cache.valid, valid, slot, 1))
            kept = (cache.keys, cache.values)
        distance = positions[:, None, :, None] - keys[0][:, None, None, :]
        mask = (distance >= 0) & keys[1][:, None, None, :]
        frequencies, windows = attention.layer_configs(self.config)
        shared = None
        if frequencies is not None and (frequencies == frequencies[0]).all():
            shared, frequencies = attention.rope_tables(frequencies[0], positions, x.dtype), None
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            state, (own, window, cache) = inputs
            rope = shared if own is None else attention.rope_tables(own, positions, x.dtype)
            seen = mask if window is None else mask & (distance < window)
            return nnx.merge(graph, state)(x, Step(rope, seen, slot), cache)

        x, kept = lazy.scan(layer, x, stacked, (frequencies, windows, kept), begin, end)
        if end is not None:
            return x, None
        if not self.opt:
            x = self.norm(x)
        elif hasattr(self, "final_layer_norm"):
            x = self.final_layer_norm(x)
        if hasattr(self, "project_out"):
            x = self.project_out(x)
        return x, None if kept is None else Cache(kept[0], kept[1], *keys)


class Decoder(nnx.Module):
    """A decoder and its head: tokens in, logits out.

    Args:
      config: a transformers config of model type ``opt``, ``llama``, ``qwen2``, ``qwen3``,
        ``gemma3_text`` or ``smollm3``.
      rngs: for random weights.
    """

    def __init__(self, config: Any, rngs: nnx.Rngs):
        body = _Body(config, rngs)
        self.model: Any = body
        if body.opt:
            self.model = nnx.Module()
            self.model.decoder = body
        self.opt = body.opt
        if not config.tie_word_embeddings:
            width = body.embed_tokens.features
            self.lm_head = nnx.Linear(width, config.vocab_size, use_bias=False, rngs=rngs)

    @property
    def body(self) -> _Body:
        """Everything but the head."""
        return self.model.decoder if self.opt else self.model

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Logits float32 [B, T, V] of a batch padded left or right.

        Args:
          input_ids: int32 [B, T].
          attention_mask: [B, T], 1 for a token, 0 for padding.
        """
        return self.head(self.hidden(input_ids, attention_mask))

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        prefix: Any = None,
        stream: Any = None,
        begin: int = 0,
    ) -> jax.Array:
        """Hidden states [B, T, D] that `head` makes logits of; arguments as in a call.

        `prefix` is keys and values [L, n, kv heads, head width] that come before every row. With
        a `stream`, which `lower` gave, from layer `begin` on; not with a prefix.
        """
        inputs.check_layers(self.body.config, stream, begin, None, prefix)
        before = 0 if prefix is None else prefix[0].shape[1]
        ids, attention_mask = inputs.check(self.body.config, input_ids, attention_mask, before)
        positions, valid = _places(attention_mask)
        if stream is not None:
            return self.body(stream, positions, valid, begin=begin)[0]
        cache, places = None, 0
        if prefix is not None:
            cache, places = self._cache(ids.shape[0], ids.shape[1], prefix)
        positions = positions + places
        x = self.body.embed(ids, positions, valid)
        return self.body(x, positions, valid, cache, places)[0]

    def lower(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        end: int,
        stream: Any = None,
        begin: int = 0,
    ) -> jax.Array:
        """Input [B, T, D] of layer `end`: all below it, or from the input of layer `begin` on."""
        inputs.check_layers(self.body.config, stream, begin, end)
        ids, attention_mask = inputs.check(self.body.config, input_ids, attention_mask)
        positions, valid = _places(attention_mask)
        x = self.body.embed(ids, positions, valid) if stream is None else stream
        return self.body(x, positions, valid, begin=begin, end=end)[0]

    def prefix(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a text int32 [n], to be the `prefix` of others."""
        if np.ndim(input_ids) != 1:
            raise ValueError(f"input_ids: expected shape [n], got {np.shape(input_ids)}")
        count = len(input_ids)
        row = (x if isinstance(x := input_ids, jax.Array) else np.asarray(x)).reshape(1, count)
        ids, mask = inputs.check(self.body.config, row, np.ones((1, count), np.int32))
        cache, _ = self._cache(1, count, None)
        positions, valid = _places(mask)
        x = self.body.embed(ids, positions, valid)
        cache = self.body(x, positions, valid, cache, 0)[1]
        return cache.keys[:, 0], cache.values[:, 0]

    def _cache(self, batch: int, room: int, prefix: Any) -> tuple[Cache, int]:
        """A cache with room for so many tokens after the prefix, and the prefix's length."""
        config, count = self.body.config, 0 if prefix is None else prefix[0].shape[1]
        shape = (config.num_hidden_layers, batch, room, *_head_shape(config))
        zeros = jnp.zeros(shape, self.body.embed_tokens.embedding[...].dtype)
        places, valid = jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch, room), bool)
        if prefix is None:
            return Cache(zeros, zeros, places, valid), 0
        every = lambda x: jnp.repeat(x[:, None].astype(zeros.dtype), batch, 1)  # noqa: E731
        first = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
        return Cache(
            jnp.concatenate([every(prefix[0]), zeros], 2),
            jnp.concatenate([every(prefix[1]), zeros], 2),
            jnp.concatenate([first, places], 1),
            jnp.concatenate([jnp.ones_like(first, bool), valid], 1),
        ), count

    def head(self, hidden: jax.Array, rows: Any = None) -> jax.Array:
        """Logits float32 [..., V] of hidden states [..., D], or those of some tokens.

        Args:
          hidden: any positions' hidden states.
          rows: int array [N] of tokens; logits are [..., N] then, and the rest is not computed.
        """
        if hasattr(self, "lm_head"):
            table = self.lm_head.kernel[...]
            table = table if rows is None else table[:, rows]
        else:
            table = self.body.embed_tokens.embedding
            table = table[...] if rows is None else lazy.take(table.get_value(), rows)
            table = table.T
        return (hidden @ table).astype(jnp.float32)

    def generate(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        max_new_tokens: int,
        stop: Any = (),
        pad: int = 0,
        prefix: Any = None,
    ) -> jax.Array:
        """Continue every row with its most probable tokens; a cache keeps keys and values.

        Args:
          input_ids: int32 [B, T], padded left or right.
          attention_mask: [B, T].
          max_new_tokens: N.
          stop: tokens that end a row.
          pad: token that fills a row that has ended.
          prefix: as in `hidden`.

        Returns:
          int32 [B, N].
        """
        body, before = self.body, 0 if prefix is None else prefix[0].shape[1]
        checks.count("max_new_tokens", max_new_tokens)
        input_ids, attention_mask = inputs.check(
            body.config, input_ids, attention_mask, before, max_new_tokens
        )
        (batch, length), (positions, valid) = input_ids.shape, _places(attention_mask)
        empty, places = self._cache(batch, length + max_new_tokens, prefix)
        positions = positions + places
        x, cache = body(body.embed(input_ids, positions, valid), positions, valid, empty, places)
        last = jnp.where(valid, positions, -1).argmax(1)
        first = self.head(x[jnp.arange(batch), last]).argmax(-1).astype(jnp.int32)
        stop, tokens = jnp.array(stop, jnp.int32), jnp.full((batch, max_new_tokens), pad, jnp.int32)

        def going(carry: Any) -> jax.Array:
            i, *_, ended = carry
            return (i < max_new_tokens) & ~ended.all()

        def step(carry: Any) -> Any:
            i, token, cache, tokens, ended = carry
            token = jnp.where(ended, pad, token)
            tokens = tokens.at[:, i].set(token)
            ended = ended | (token[:, None] == stop[None]).any(1)
            place = positions.max(1, keepdims=True) + 1 + i
            slot = places + length + i
            there = jnp.ones_like(place, bool)
            x, cache = body(body.embed(token[:, None], place, there), place, there, cache, slot)
            return i + 1, self.head(x[:, 0]).argmax(-1).astype(jnp.int32), cache, tokens, ended

        start = (jnp.int32(0), first, cache, tokens, jnp.zeros(batch, bool))
        return jax.lax.while_loop(going, step, start)[3]


def _check(config: Any) -> None:
    """Refuse what a config may ask for and no tensor shows."""
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError("config: use_bidirectional_attention is not supported, each token sees "
                         "those before it")  # fmt: skip
    if getattr(config, "is_causal", True) is False:
        raise ValueError("config: is_causal is false: an encoder of this family is not supported, "
                         "each token sees those before it")  # fmt: skip
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ValueError(f"config: {name} is not supported")
    attention.layer_configs(config)


def _places(attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions int32 [B, T], counted from the first token of each row, and what is a token."""
    valid = attention_mask > 0
    return jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0), valid


def _head_shape(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width
