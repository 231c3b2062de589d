"""Attention, and rotary positions: which frequencies and which window each layer has."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attend from q [B, T, N, H] to k and v [B, S, M, H], where mask [B, 1, T, S] is True."""
    dtype = q.dtype
    if dtype == jnp.float16:  # CPUs and TPUs refuse its products with float32 sums
        q, k, v = (part.astype(jnp.float32) for part in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale).astype(dtype)


def layer_configs(config: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Frequencies [L, head width / 2] and windows int32 [L] of a config's layers.

    A layer without rotary positions has frequency 0. Windows are None if no layer slides.

    Raises:
      ValueError: a kind of layer or of rope scaling that is not supported, by name.
    """
    if config.model_type == "opt":
        return None, None
    count = config.num_hidden_layers
    # Llama's layers are all alike, whatever its config has for others to read.
    kinds = None if config.model_type == "llama" else getattr(config, "layer_types", None)
    kinds = kinds or ["full_attention"] * count
    if others := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config: layer_types {sorted(others)} are not supported")
    # SmolLM3's own field, which may have more layers than the model.
    own = config.no_rope_layers[:count] if config.model_type == "smollm3" else None
    used = own or [1] * count
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = np.stack(
        [_frequencies(config, kind, width) * bool(on) for kind, on in zip(kinds, used, strict=True)]
    )
    slides = [kind == "sliding_attention" for kind in kinds]
    if not any(slides):
        return frequencies, None
    if config.sliding_window is None:
        raise ValueError("config: sliding_window: expected a number, since layer_types has layers "
                         "that slide; got null")  # fmt: skip
    window = np.where(slides, config.sliding_window, np.iinfo(np.int32).max)
    return frequencies, window.astype(np.int32)


def _frequencies(config: Any, kind: str, width: int) -> np.ndarray:
    own = config.rope_parameters or {}
    own = own.get(kind, own) if isinstance(own.get(kind, own), dict) else own
    try:
        return _turned(own, width)
    except KeyError as error:
        raise ValueError(f"config: rope_parameters lack {error}, they are {own}") from None


def _turned(own: Any, width: int) -> np.ndarray:
    if own.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("config: partial_rotary_factor is not supported")
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    plain = np.float32(1) / np.float32(own["rope_theta"]) ** exponents
    match own.get("rope_type", "default"):
        case "default":
            return plain
        case "linear":
            return plain / np.float32(own["factor"])
        case "llama3":
            factor, length = own["factor"], own["original_max_position_embeddings"]
            low, high = own["low_freq_factor"], own["high_freq_factor"]
            wave = 2 * math.pi / plain
            smooth = (length / wave - low) / (high - low)
            between = (1 - smooth) * plain / factor + smooth * plain
            scaled = np.where(wave > length / low, plain / factor, between)
            return np.where(wave < length / high, plain, scaled).astype(np.float32)
        case other:
            raise ValueError(
                f"config: rope_type {other!r} is not supported, only 'default', 'linear', 'llama3'"
            )


def rope_tables(frequencies: Any, positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, head width] of positions [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    angles = jnp.concatenate([angles, angles], -1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rope(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Turn queries or keys [B, T, heads, head width] to their positions."""
    first, second = jnp.split(x, 2, -1)
    return x * cosines + jnp.concatenate([-second, first], -1) * sines
