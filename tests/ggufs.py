"""Small GGUF files, written with the package that llama.cpp's own converter uses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

WIDTH, INNER, WORDS = 256, 256, 48  # whole blocks of the K quantizations in every row
# Heads, heads of keys, width of a head, layers. transformers takes 128 for Qwen3's heads and 256 for
# Gemma 3's scale whatever a file says; Gemma's sixth layer is the first without a window.
FAMILIES = {"llama": (4, 2, 64, 2), "qwen2": (4, 2, 64, 2), "qwen3": (3, 1, 128, 2),
            "gemma3": (1, 1, 256, 6)}  # fmt: skip
# Bytes of the float16 scales in a block of those that the package cannot write, and how large.
SCALES = {Kind.Q4_K: ((0, 2), 2e-4), Kind.Q5_K: ((0, 2), 1e-4), Kind.Q6_K: ((208,), 5e-5),
          Kind.Q2_K: ((80, 82), 1e-3)}  # fmt: skip


def quantized(x: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """Numbers as a file has them; K quantizations are random blocks of these numbers' shape."""
    if kind not in SCALES:
        return gguf.quantize(x, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (x.size // block, size), np.uint8)
    places, scale = SCALES[kind]
    for place in places:
        scales = (scale * rng.uniform(0.5, 1, len(raw))).astype(np.float16)
        raw[:, place : place + 2] = scales[:, None].view(np.uint8)
    return raw.reshape(*x.shape[:-1], -1)


def tensors(family: str, tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors by their names in a GGUF file, in the order of that format."""
    heads, kv_heads, head, layers = FAMILIES[family]
    gemma, rng = family == "gemma3", np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (WORDS, WIDTH)}
    shapes["output_norm.weight"] = (WIDTH,)
    shapes |= {} if tied else {"output.weight": (WORDS, WIDTH)}
    for i in range(layers):
        rows = {"attn_q": heads * head, "attn_k": kv_heads * head, "attn_v": kv_heads * head}
        own: dict[str, tuple[int, ...]] = {f"{n}.weight": (r, WIDTH) for n, r in rows.items()}
        own["attn_output.weight"] = (WIDTH, heads * head)
        own |= {f"ffn_{n}.weight": (INNER, WIDTH) for n in ("gate", "up")}
        own["ffn_down.weight"] = (WIDTH, INNER)
        norms = ["attn_norm", "ffn_norm", *["post_attention_norm", "post_ffw_norm"] * gemma]
        own |= {f"{n}.weight": (WIDTH,) for n in norms}
        if family in ("qwen3", "gemma3"):
            own |= {f"attn_{n}_norm.weight": (head,) for n in "qk"}
        if family == "qwen2":
            own |= {f"{n}.bias": (r,) for n, r in rows.items()}
        shapes |= {f"blk.{i}.{n}": shape for n, shape in own.items()}
    return {name: (0.1 * rng.normal(size=shape) + name.endswith("norm.weight")).astype(np.float32)
            for name, shape in shapes.items()}  # fmt: skip


def metadata(family: str) -> dict[str, Any]:
    """What such a file says of its model."""
    heads, kv_heads, head, layers = FAMILIES[family]
    own: dict[str, Any] = {
        "block_count": layers, "context_length": 128, "embedding_length": WIDTH,
        "feed_forward_length": INNER, "attention.head_count": heads,
        "attention.head_count_kv": kv_heads, "attention.key_length": head,
        "attention.value_length": head, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0, "vocab_size": WORDS,
    }  # fmt: skip
    own |= {"attention.sliding_window": 4} if family == "gemma3" else {}
    own |= {"rope.dimension_count": head} if family == "llama" else {}
    return {f"{family}.{key}": x for key, x in own.items()}


WRITE = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string",
         list: "add_array"}  # fmt: skip


def write(
    path: Path,
    family: str = "llama",
    kind: Kind = Kind.F32,
    said: Mapping[str, Any] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    tied: bool = True,
    **options: Any,
) -> Path:
    """Write a file.

    Args:
      path: of the file.
      family: one of `FAMILIES`.
      kind: of all matrices; the others are float32.
      said: metadata beside or in the place of the usual; None leaves a field out.
      more: tensors beside or in the place of the usual.
      tied: whether the embeddings are the output too.
      **options: of the writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, family, **options)
    for key, x in (metadata(family) | dict(said or {})).items():
        if x is not None:
            getattr(writer, WRITE[type(x)])(key, x)
    rng = np.random.default_rng(1)
    for name, x in (tensors(family, tied) | dict(more or {})).items():
        own = kind if x.ndim == 2 else Kind.F32
        raw = own if own != Kind.F16 else None
        writer.add_tensor(name, quantized(x, own, rng), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
