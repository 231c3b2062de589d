"""GGUF files, as llama.cpp and Ollama have them: tensors by Hugging Face's names, as plain numbers.

The reader and the arithmetic are those of the package ``gguf``; nothing is mapped into memory and
any part of a tensor can be read alone.
"""

import math
import os
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.gguf_reader import ReaderField

from hiso_jax._engine.tensorfile import Tensor, TensorFile, stand_in

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Architectures that are read, and what transformers calls them."""
TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types of numbers, and quantizations, that are read."""
_ROPE_FACTORS = "rope_freqs.weight"

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA = _LAYER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip

# What reading a damaged file raises.
_BROKEN = (ValueError, TypeError, LookupError, ArithmeticError, struct.error)


class _Reader(gguf.GGUFReader):
    """The package's reader, but for files that are cut and for large vocabularies.

    It takes what lies beyond the end for empty arrays, and so would count to whatever length a
    damaged file names; and it makes two arrays of each word, 0.7 GB of Gemma's 262 thousand.
    """

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"truncated or damaged: expected {end:,} bytes or more, found "
                             f"{len(self.data):,}; fetch it again")  # fmt: skip
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        begin = end = orig_offs + 12
        if kind == GGUFValueType.STRING:
            held: Any = self.data
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", held, end)[0]
            array = self._get(begin, np.uint8, end - begin)
        elif kind in self.gguf_scalar_to_np:
            array = self._get(begin, self.gguf_scalar_to_np[kind], count)
        else:
            raise ValueError(f"metadata with an array of {kind.name}")
        return 12 + array.nbytes, [array, np.array([begin])], [0], [GGUFValueType.ARRAY, kind]


class _Words(NamedTuple):
    """Where in the file a list of texts is."""

    offset: int
    size: int


def _value(field: ReaderField) -> Any:
    """What a field says: a number, a text, an array of numbers, or where a list of texts is."""
    part: Any = field.parts[field.data[0]]
    match field.types:
        case [GGUFValueType.STRING]:
            return bytes(part).decode("utf-8", "replace")
        case [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            return _Words(int(field.parts[-1][0]), part.nbytes)
        case [GGUFValueType.ARRAY, _]:
            return np.array(part)  # not a view, which would keep the file mapped
    return part[0].item()


class _Source(NamedTuple):
    """How a tensor is stored."""

    kind: GGMLQuantizationType
    unit: int  # elements that have to be read together
    head: int  # rows of a head, which are interleaved; 0: as they should be
    offset: int  # what was added to its numbers


class GGUFFile(TensorFile):
    """The tensors of a GGUF file, read like those of a `TensorFile`: as float32, by other names.

    What the format changes is undone: rows of Llama's queries and keys are in the order that
    transformers has them in, and Gemma's norms are around 0.

    Attributes:
      architecture: one of `ARCHITECTURES`.
      fields: the file's metadata by their names; lists of texts are given by `words`.
      rope_factors: float32 [head width / 2], what rotary frequencies are divided by, or None.

    Raises:
      ValueError: no GGUF file, truncated, one part of several, another architecture, or other
        quantizations, by name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.metadata, self.tensors = path, {"format": "pt"}, {}
        self._sources: dict[str, _Source] = {}
        self._file = os.open(path, os.O_RDONLY)
        begin = os.pread(self._file, 64, 0)
        try:
            reader = _Reader(path)
            self.fields = {name: _value(field) for name, field in reader.fields.items()}
            self.architecture = _architecture(reader, self.fields)
            _check(reader)
            for tensor in reader.tensors:
                name, shape = _name(tensor.name, self.architecture), tensor.shape[::-1].tolist()
                if name in self.tensors:
                    raise ValueError(f"two tensors are {name!r}")
                self._sources[name] = self._source(tensor.name, tensor.tensor_type, shape)
                self.tensors[name] = Tensor(np.dtype("float32"), tuple(shape), tensor.data_offset)
            self.rope_factors = None
            if factors := self.tensors.get(_ROPE_FACTORS):
                self.rope_factors = self.read(_ROPE_FACTORS, 0, factors.size)
                del self.tensors[_ROPE_FACTORS]
        except _BROKEN as error:
            os.close(self._file)
            text = f"truncated or damaged: {error}" if isinstance(error, struct.error) else error
            if not begin.startswith(b"GGUF"):
                text = f"not a GGUF file: {stand_in(begin) or 'it does not begin as one'}"
            raise ValueError(f"{path}: {text}") from error

    def __enter__(self) -> "GGUFFile":
        return self

    def check_length(self) -> None:
        """Nothing: it was done on opening, tensor by tensor."""

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number >= 1 of the metadata, ``{architecture}.{key}``.

        Raises:
          ValueError: it is something else, or missing and there is no default.
        """
        name = f"{self.architecture}.{key}"
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            found = "none" if value is None else f"{value!r:.80}"
            raise ValueError(f"metadata {name}: expected a whole number >= 1, found {found}")
        return value

    def words(self, key: str) -> list[str]:
        """A list of texts of the metadata, by its whole name; empty if there is none."""
        place, words, begin = self.fields.get(key), [], 0
        held = self._bytes(key, *place).tobytes() if isinstance(place, _Words) else b""
        while begin < len(held):
            end = begin + 8 + struct.unpack_from("<Q", held, begin)[0]
            words.append(held[begin + 8 : end].decode("utf-8", "replace"))
            begin = end
        return words

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Return `count` elements of a flattened tensor as float32, from number `start` on."""
        tensor, source = self.tensors[name], self._sources[name]
        if count == 0:
            return np.zeros(0, np.float32)
        first = start // source.unit * source.unit
        last = min(-(-(start + count) // source.unit) * source.unit, tensor.size)
        block, size = GGML_QUANT_SIZES[source.kind]
        place, length = (n // block * size for n in (first, last - first))
        raw = self._bytes(name, tensor.offset + place, length)
        # The package works on a few rows at a time: small arrays, and less memory.
        row = tensor.shape[-1] // block * size
        x = gguf.dequantize(raw.reshape(-1, row if length % row == 0 else length), source.kind)
        if source.head:  # row 2i of a head is row i of its first half, row 2i + 1 of its second
            width = tensor.size // tensor.shape[0]
            x = x.reshape(-1, source.head // 2, 2, width).swapaxes(1, 2)
        x = x.reshape(-1)[start - first : start - first + count]
        return x - np.float32(source.offset) if source.offset else x

    def _source(self, name: str, kind: GGMLQuantizationType, shape: list[int]) -> _Source:
        """How a tensor is stored, by its own name."""
        block, _ = GGML_QUANT_SIZES[kind]
        offset = int(self.architecture == "gemma3" and name.endswith("norm.weight"))
        part = re.search(r"\.attn_([qk])\.", name)
        if self.architecture != "llama" or part is None:
            return _Source(kind, block, 0, offset)
        heads = self.count("attention.head_count")
        if part[1] == "k":
            heads = self.count("attention.head_count_kv", heads)
        head, rest = divmod(shape[0], heads)
        if rest or head % 2:
            raise ValueError(f"{name!r} has {shape[0]} rows, expected an even number for each of "
                             f"{heads} heads")  # fmt: skip
        return _Source(kind, math.lcm(block, head * math.prod(shape[1:])), head, offset)

    def _bytes(self, name: str, offset: int, size: int) -> np.ndarray:
        """Bytes uint8 [size] of the file."""
        raw = np.empty(size, np.uint8)
        left = memoryview(raw.data)
        while left:
            done = os.preadv(self._file, [left], offset)
            if not done:
                raise ValueError(f"{self.path}: truncated inside {name!r}")
            left, offset = left[done:], offset + done
        return raw


def _architecture(reader: _Reader, fields: Mapping[str, Any]) -> str:
    """What a file is of; ValueError if nothing here can use it."""
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise ValueError("its numbers are big-endian, which is not supported")
    kind, name = fields.get("general.type", "model"), fields.get("general.architecture")
    if kind != "model":
        raise ValueError(f"a GGUF file of type {kind!r:.80}, expected 'model'")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r:.80} is not supported, only {list(ARCHITECTURES)}")
    if (parts := fields.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"one of {parts} parts of a split GGUF file, expected a whole one: join "
                         "them with `llama-gguf-split --merge`")  # fmt: skip
    return name


def _check(reader: _Reader) -> None:
    """Raise ValueError unless the tensors lie end to end and are of types that are read."""
    end = reader.data_offset
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in TYPES:
            raise ValueError(f"tensor {tensor.name!r} is of type {tensor.tensor_type.name}, which "
                             f"is not supported, only {', '.join(TYPES)}")  # fmt: skip
        if tensor.data_offset != end:
            raise ValueError(f"damaged: tensor {tensor.name!r} is at byte {tensor.data_offset:,}, "
                             f"expected {end:,}; fetch it again")  # fmt: skip
        end += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


def _name(name: str, architecture: str) -> str:
    """Hugging Face's name of a tensor, or its own if it has no place in these models."""
    layers = _GEMMA if architecture == "gemma3" else _LAYER
    match re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name):
        case None:
            return name
        case found:
            number, part, last = found.groups()
    if number is None:
        return f"{_OUTER[part]}.{last}" if part in _OUTER else name
    return f"model.layers.{int(number)}.{layers[part]}.{last}" if part in layers else name
