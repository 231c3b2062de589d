"""Layers of decoders in flax.nnx, attributes named as Hugging Face names its tensors.

OPT's, and that of the Llama family (Llama, Qwen2, Qwen3, Gemma 3 text, SmolLM3), whose members
differ by config.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hiso_jax._engine import exact
from hiso_jax.models import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
}


def stack_of(make: Callable[[Any, nnx.Rngs], nnx.Module], config: Any, rngs: nnx.Rngs) -> Any:
    """``config.num_hidden_layers`` layers as one, whose leaves are [layers, ...]."""

    @nnx.split_rngs(splits=config.num_hidden_layers)
    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return make(config, rngs)

    return stack(rngs)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function of a config's name.

    Raises:
      ValueError: another name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"config: activation {name!r} is not supported, only {list(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Step(NamedTuple):
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
        """Normalize the last axis, in float32 at least."""
        wide = exact.wide(x)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        weight = self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))
        if self.offset:
            return (wide * (self.offset + exact.wide(weight))).astype(x.dtype)
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

    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the keys and values to keep."""
        split = (*x.shape[:2], -1, self.head_width)
        q, k, v = (part(x).reshape(split) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.rope is not None:
            q, k = attention.apply_rope(q, *step.rope), attention.apply_rope(k, *step.rope)
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
        self.self_attn_layer_norm = opt_norm(config, rngs)
        self.fc1 = nnx.Linear(width, config.ffn_dim, use_bias=bias, rngs=rngs)
        self.fc2 = nnx.Linear(config.ffn_dim, width, use_bias=bias, rngs=rngs)
        self.final_layer_norm = opt_norm(config, rngs)
        self.before = config.do_layer_norm_before
        self.activation = activation(config.activation_function)

    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the cache of this layer."""
        norm = self.self_attn_layer_norm
        y, cache = self.self_attn(norm(x) if self.before else x, step, cache)
        x = x + y if self.before else norm(x + y)
        norm = self.final_layer_norm
        y = self.fc2(self.activation(self.fc1(norm(x) if self.before else x)))
        return x + y if self.before else norm(x + y), cache


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs, affine: bool = True) -> nnx.LayerNorm:
    """A layer norm that keeps its digits where the mean is large, as flax's own does not."""
    return nnx.LayerNorm(
        width, epsilon=epsilon, use_bias=affine, use_scale=affine, use_fast_variance=False,
        rngs=rngs,
    )  # fmt: skip


def opt_norm(config: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """OPT's norm; some of its models have no weights there."""
    return layer_norm(config.hidden_size, 1e-5, rngs, config.layer_norm_elementwise_affine)


class _Gated(nnx.Module):
    def __init__(self, config: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        bias = getattr(config, "mlp_bias", False)
        self.gate_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up_proj = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down_proj = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)
        gemma = config.model_type == "gemma3_text"
        self.activation = activation(config.hidden_activation if gemma else config.hidden_act)

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

    def __call__(self, x: jax.Array, step: Step, cache: Any) -> tuple[jax.Array, Any]:
        """Return [B, T, D] and the cache of this layer."""
        y, cache = self.self_attn(self.input_layernorm(x), step, cache)
        if self.gemma:
            x = x + self.post_attention_layernorm(y)
            y = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(y), cache
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache
