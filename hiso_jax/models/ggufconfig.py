"""What a GGUF file says of its model, as the config.json of a Hugging Face folder would."""

import math
import re
from typing import Any

import numpy as np

from hiso_jax.models.gguffile import ARCHITECTURES, GGUFFile

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
            "gemma3": "Gemma3ForCausalLM"}  # fmt: skip
# What is read, or changes nothing. Anything else under the architecture's name may change what
# the model computes, and no tensor would show it.
_KNOWN = """
    block_count context_length embedding_length feed_forward_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon attention.causal attention.sliding_window
    attention.sliding_window_pattern final_logit_softcapping attn_logit_softcapping
    rope.dimension_count rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned
    expert_count expert_used_count tensor_data_layout
""".split()


def config_of(file: GGUFFile) -> dict[str, Any]:
    """What the config.json of a file's model would say.

    Raises:
      ValueError: metadata that is missing, contradicts the tensors, or asks for what is not
        supported, by its name.
    """
    try:
        return _config(file)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _config(file: GGUFFile) -> dict[str, Any]:
    _check(file)
    heads, layers, width = (
        file.count(key) for key in ("attention.head_count", "block_count", "embedding_length")
    )
    head = file.count("attention.key_length", width // heads)
    _check_shapes(file, layers, width, heads, head)
    own = {name: f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")}
    own["pad"] = "tokenizer.ggml.padding_token_id"
    config: dict[str, Any] = {
        "architectures": [_CLASSES[file.architecture]],
        "model_type": ARCHITECTURES[file.architecture],
        "vocab_size": file.count("vocab_size", file.tensors["model.embed_tokens.weight"].shape[0]),
        "hidden_size": width,
        "intermediate_size": file.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": file.count("attention.head_count_kv", heads),
        "max_position_embeddings": file.count("context_length"),
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        # The output is written only where it is not the embeddings.
        "tie_word_embeddings": "lm_head.weight" not in file.tensors,
        **{f"{name}_token_id": file.fields.get(key) for name, key in own.items()},
    }
    if file.architecture != "qwen2" or head != width // heads:  # Qwen2's own config has none
        config["head_dim"] = head
    if file.architecture != "qwen2":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in file.tensors
    if file.architecture == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in file.tensors
    gemma = file.architecture == "gemma3"
    return config | (_gemma(file, head) if gemma else {"rope_parameters": _rope(file, head)})


def _check(file: GGUFFile) -> None:
    """Refuse what would change the model's numbers and is not known or supported here."""
    prefix = f"{file.architecture}."
    gemma = file.architecture == "gemma3"
    for key in (name.removeprefix(prefix) for name in file.fields if name.startswith(prefix)):
        value = file.fields[prefix + key]
        wrong = key not in _KNOWN
        wrong |= key.startswith("expert_") and value != 0
        wrong |= key == "attention.causal" and value is not True
        wrong |= key.endswith("softcapping") and value != 0
        wrong |= key.startswith("attention.sliding_window") and not gemma
        wrong |= key == "rope.freq_base_swa" and not gemma
        if wrong:
            raise ValueError(f"metadata {prefix}{key} ({value!r:.60}) is not supported")


def _check_shapes(file: GGUFFile, layers: int, width: int, heads: int, head: int) -> None:
    """Compare with the tensors what decides how large anything is."""
    numbers = {int(m[1]) for n in file.tensors if (m := re.match(r"model\.layers\.(\d+)\.", n))}
    if numbers != set(range(layers)):
        raise ValueError(f"metadata {file.architecture}.block_count is {layers}, there are "
                         f"tensors of {len(numbers)} layers")  # fmt: skip
    for name, wanted in {
        "model.embed_tokens.weight": (None, width),
        "model.layers.0.self_attn.q_proj.weight": (heads * head, width),
    }.items():
        if name not in file.tensors:
            raise ValueError(f"tensors missing: {name!r}")
        found = file.tensors[name].shape
        if len(found) != 2 or wanted not in (found, (None, found[1])):
            rows = "any" if wanted[0] is None else wanted[0]
            raise ValueError(f"{name!r} has shape {found}, expected ({rows}, {width}) by the "
                             "metadata")  # fmt: skip
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := file.count(key, head)) != head:
            raise ValueError(f"metadata {file.architecture}.{key}: only the width of a head, "
                             f"{head}, is supported, found {other}")  # fmt: skip


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A number > 0 of the metadata."""
    name = f"{file.architecture}.{key}"
    value = file.fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        found = "none" if value is None else f"{value!r:.80}"
        raise ValueError(f"metadata {name}: expected a number > 0, found {found}")
    return float(value)


def _rope(file: GGUFFile, head: int) -> dict[str, Any]:
    """Rotary positions as transformers has them, of the layers without a window."""
    gemma = file.architecture == "gemma3"
    theta = _number(file, "rope.freq_base", 1e6 if gemma else 1e4)
    kind = file.fields.get(f"{file.architecture}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"metadata {file.architecture}.rope.scaling.type: {kind!r:.60} is not "
                         "supported, only 'none' and 'linear'")  # fmt: skip
    factor = 1.0
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        if kind == "linear" and file.fields.get(f"{file.architecture}.{key}", 0) != 0:
            factor = _number(file, key)
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if file.rope_factors is not None and (file.rope_factors != 1).any():
        if factor != 1:
            raise ValueError("rope_freqs.weight beside a linear rope scaling is not supported")
        return plain | _llama3(file, head, theta)
    return plain if factor == 1 else plain | {"rope_type": "linear", "factor": factor}


def _llama3(file: GGUFFile, head: int, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1, of which the format keeps only what each frequency is divided by.

    Raises:
      ValueError: the factors are others than those that Llama 3.1's way gives.
    """
    factors: Any = file.rope_factors
    length = file.count("rope.scaling.original_context_length", 8192)
    low, high, factor = 1.0, 4.0, float(factors.max())
    wave = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    smooth = np.clip((length / wave - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != wanted.shape or not np.allclose(factors, wanted, rtol=1e-4):
        raise ValueError("rope_freqs.weight: factors of another rope scaling than Llama 3.1's are "
                         "not supported")  # fmt: skip
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }  # fmt: skip


def _gemma(file: GGUFFile, head: int) -> dict[str, Any]:
    """Windows, scales and rotary positions of Gemma 3."""
    layers, slides = file.count("block_count"), "gemma3.attention.sliding_window" in file.fields
    pattern = file.fields.get("gemma3.attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray):  # layer by layer
        on = pattern.astype(bool).tolist()
    else:
        every = file.count("attention.sliding_window_pattern", 6)
        on = [(i + 1) % every != 0 for i in range(layers)]
    if len(on) != layers:
        raise ValueError(f"metadata gemma3.attention.sliding_window_pattern: expected {layers} of "
                         f"them, found {len(on)}")  # fmt: skip
    kinds = [("full_attention", "sliding_attention")[slides and own] for own in on]
    local = _number(file, "rope.freq_base_swa", 1e4)
    # As llama.cpp has it, for the format does not say: the largest one divides by another root.
    scalar = file.count("embedding_length") // file.count("attention.head_count")
    return {
        "layer_types": kinds,
        "sliding_window": file.count("attention.sliding_window", 512),
        "query_pre_attn_scalar": scalar if layers == 62 else head,
        "rope_parameters": {
            "full_attention": _rope(file, head),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }
