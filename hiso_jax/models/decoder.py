"""Decoders in flax.nnx, attributes named as Hugging Face names its tensors.

One attention and one loop over layers for all: OPT (pre- and post-norm, projections), and
the Llama family (Llama, Qwen2, Qwen3, Gemma 3 text, SmolLM3), whose members differ by config.
Layers are stacked ([L, ...] leaves) and scanned, so a deep model compiles as fast as a
shallow one; what differs between layers (rotary frequencies, window) is scanned with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hiso_jax import lazy
from hiso_jax.models import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far, S slots."""

    keys: jax.Array  # [L, B, S, kv heads, head width]
    values: jax.Array  # as keys
    positions: jax.Array  # int32 [B, S]: of the token in each slot
    valid: jax.Array  # bool [B, S]


class _Step(NamedTuple):
    """What a layer needs besides its input."""

    rope: Any  # None, or cos and sin [B, T, 1, head width]
    mask: jax.Array  # bool [B, 1, T, S]
    slot: Any  # where in the cache the new keys go


class RMSNorm(nnx.Module):
    """Root mean square norm; `offset` 1 is Gemma's, whose weights are around 0."""

    def __init__(self, width: int, epsilon: float, offset: int = 0):
        self.weight = nnx.Param(jnp.full(width, 1.0 - offset))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis, in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        if self.offset:
            return (wide * (self.offset + weight.astype(jnp.float32))).astype(x.dtype)
        return weight * wide.astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention with grouped queries, rotary positions and a cache, all optional."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        scale: float,
        biases: tuple[bool, bool],
        out: str,
        rngs: nnx.Rngs,
        norm: Callable[[int], nnx.Module] | None = None,
    ):
        def linear(i: int, o: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(i, o, use_bias=bias, rngs=rngs)

        self.q_proj = linear(width, heads * head_width, biases[0])
        self.k_proj = linear(width, kv_heads * head_width, biases[0])
        self.v_proj = linear(width, kv_heads * head_width, biases[0])
        setattr(self, out, linear(heads * head_width, width, biases[1]))
        if norm is not None:
            self.q_norm, self.k_norm = norm(head_width), norm(head_width)
        self.out, self.head_width, self.scale = out, head_width, scale
        self.normed = norm is not None

    def __call__(self, x: jax.Array, step: _Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the keys and values to keep."""
        split = (*x.shape[:2], -1, self.head_width)
        q, k, v = (part(x).reshape(split) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.rope is not None:
            q, k = attention.rotate(q, *step.rope), attention.rotate(k, *step.rope)
        if cache is not None:
            put = jax.lax.dynamic_update_slice_in_dim
            k, v = put(cache[0], k, step.slot, 1), put(cache[1], v, step.slot, 1)
        y = attention.attend(q, k, v, step.mask, self.scale)
        y = getattr(self, self.out)(y.reshape(*x.shape[:2], -1))
        return y, None if cache is None else (k, v)


class OptLayer(nnx.Module):
    """OPT's layer: norms before (or, 350m, after), ReLU."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        width, bias = config.hidden_size, config.enable_bias
        head = width // config.num_attention_heads
        self.self_attn = Attention(
            width, config.num_attention_heads, config.num_attention_heads, head, head**-0.5,
            (bias, bias), "out_proj", rngs,
        )  # fmt: skip
        self.self_attn_layer_norm = _layer_norm(config, rngs)
        self.fc1 = nnx.Linear(width, config.ffn_dim, use_bias=bias, rngs=rngs)
        self.fc2 = nnx.Linear(config.ffn_dim, width, use_bias=bias, rngs=rngs)
        self.final_layer_norm = _layer_norm(config, rngs)
        self.before = config.do_layer_norm_before
        self.activation = ACTIVATIONS[config.activation_function]

    def __call__(self, x: jax.Array, step: _Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the cache of this layer."""
        norm = self.self_attn_layer_norm
        y, cache = self.self_attn(norm(x) if self.before else x, step, cache)
        x = x + y if self.before else norm(x + y)
        norm = self.final_layer_norm
        y = self.fc2(self.activation(self.fc1(norm(x) if self.before else x)))
        return x + y if self.before else norm(x + y), cache


def _layer_norm(config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size, epsilon=1e-5, use_bias=affine, use_scale=affine, rngs=rngs
    )


class _Gated(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)
        name = getattr(config, "hidden_act", None) or config.hidden_activation
        self.activation = ACTIVATIONS[name]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nnx.Module):
    """Llama's layer and its relatives': Qwen2 biases, Qwen3 and Gemma norms of q and k."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        kind, width = config.model_type, config.hidden_size
        self.gemma = kind == "gemma3_text"
        norm = lambda size: RMSNorm(size, config.rms_norm_eps, int(self.gemma))  # noqa: E731
        head = getattr(config, "head_dim", None) or width // config.num_attention_heads
        bias = getattr(config, "attention_bias", False)
        self.self_attn = Attention(
            width,
            config.num_attention_heads,
            config.num_key_value_heads or config.num_attention_heads,
            head,
            config.query_pre_attn_scalar**-0.5 if self.gemma else head**-0.5,
            (True, False) if kind == "qwen2" else (bias, bias),
            "o_proj",
            rngs,
            norm if kind in ("qwen3", "gemma3_text") else None,
        )
        self.mlp = _Gated(config, rngs)
        self.input_layernorm = norm(width)
        self.post_attention_layernorm = norm(width)
        if self.gemma:
            self.pre_feedforward_layernorm = norm(width)
            self.post_feedforward_layernorm = norm(width)

    def __call__(self, x: jax.Array, step: _Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the cache of this layer."""
        y, cache = self.self_attn(self.input_layernorm(x), step, cache)
        if self.gemma:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y), cache
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class _Body(nnx.Module):
    """Everything but the head; `decoder` inside `model` for OPT, `model` itself for others."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        self.opt = config.model_type == "opt"
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
                self.final_layer_norm = _layer_norm(config, rngs)
        else:
            offset = int(config.model_type == "gemma3_text")
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset)

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return make(config, rngs)

        self.layers = stack(rngs)
        self.scale = config.hidden_size**0.5 if config.model_type == "gemma3_text" else None
        self.config = config

    def __call__(
        self, input_ids: jax.Array, positions: jax.Array, valid: jax.Array, cache: Any, slot: Any
    ) -> tuple[jax.Array, Any]:
        """Return hidden states [B, T, D] and the cache with these tokens in it."""
        x = lazy.rows(self.embed_tokens.embedding.get_value(), input_ids)
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.opt:
            if hasattr(self, "project_in"):
                x = self.project_in(x)
            # Padding is at position -1, as in the checkpoints' own code.
            places = jnp.where(valid, positions, -1) + 2
            x = x + lazy.rows(self.embed_positions.embedding.get_value(), places)
        keys, kept = (positions, valid), None
        if cache is not None:
            put = jax.lax.dynamic_update_slice_in_dim
            keys = (put(cache.positions, positions, slot, 1), put(cache.valid, valid, slot, 1))
            kept = (cache.keys, cache.values)
        distance = positions[:, None, :, None] - keys[0][:, None, None, :]
        mask = (distance >= 0) & keys[1][:, None, None, :]
        frequencies, windows = attention.of_layers(self.config)
        shared = None
        if frequencies is not None and (frequencies == frequencies[0]).all():
            shared, frequencies = attention.turns(frequencies[0], positions, x.dtype), None
        graph, stacked = nnx.split(self.layers)

        def layer(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            state, (own, window, cache) = inputs
            rope = shared if own is None else attention.turns(own, positions, x.dtype)
            seen = mask if window is None else mask & (distance < window)
            return nnx.merge(graph, state)(x, _Step(rope, seen, slot), cache)

        x, kept = lazy.scan(layer, x, stacked, (frequencies, windows, kept))
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
        self, input_ids: jax.Array, attention_mask: jax.Array, prefix: Any = None
    ) -> jax.Array:
        """Hidden states [B, T, D] that `head` makes logits of; arguments as in a call.

        `prefix` is keys and values [L, n, kv heads, head width] that come before every row.
        """
        positions, valid = _places(attention_mask)
        if prefix is None:
            return self.body(input_ids, positions, valid, None, None)[0]
        batch, length = input_ids.shape
        cache, places = self._cache(batch, length, prefix)
        return self.body(input_ids, positions + places, valid, cache, places)[0]

    def prefix(self, input_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a text int32 [n], to be the `prefix` of others."""
        cache, _ = self._cache(1, len(input_ids), None)
        positions, valid = _places(jnp.ones((1, len(input_ids)), jnp.int32))
        cache = self.body(input_ids[None], positions, valid, cache, 0)[1]
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
        first = jnp.broadcast_to(jnp.arange(count)[None], (batch, count))
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
            table = table[...] if rows is None else lazy.rows(table.get_value(), rows)
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
        batch, length = input_ids.shape
        (positions, valid), body = _places(attention_mask), self.body
        empty, places = self._cache(batch, length + max_new_tokens, prefix)
        positions = positions + places
        x, cache = body(input_ids, positions, valid, empty, places)
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
            x, cache = body(token[:, None], place, jnp.ones_like(place, bool), cache, slot)
            return i + 1, self.head(x[:, 0]).argmax(-1).astype(jnp.int32), cache, tokens, ended

        start = (jnp.int32(0), first, cache, tokens, jnp.zeros(batch, bool))
        return jax.lax.while_loop(going, step, start)[3]


def _places(attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions int32 [B, T], counted from the first token of each row, and what is a token."""
    valid = attention_mask > 0
    return jnp.maximum(jnp.cumsum(valid, 1, dtype=jnp.int32) - 1, 0), valid


def _head_shape(config: Any) -> tuple[int, int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return heads, width
