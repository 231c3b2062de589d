"""Safetensors files read and written in parts, without ever holding or mapping a whole one.

The library safetensors reads through a memory map, which counts as the process's own
memory as it is read, and writes from memory only. The format itself is a length, a JSON header
and the numbers.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
           "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
           "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool"}  # fmt: skip
_NAMES = {name: code for code, name in _DTYPES.items()}
QUANTIZED = "a quantized checkpoint, which is not supported; use the unquantized one"
"""What is said of weights that are codes and not numbers."""


class Tensor(NamedTuple):
    """Type, shape and place of a tensor in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0  # bytes from the file's beginning

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def stand_in(begin: bytes) -> str | None:
    """What lies in a file's place where its content was never fetched, by its first bytes.

    Example:
      >>> stand_in(b"version https://git-lfs.github.com/spec/v1 oid sha256:...")
      'a Git LFS pointer, not the content: run `git lfs pull` in its folder'
    """
    if not begin:
        return "an empty file: fetch it again"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the content: run `git lfs pull` in its folder"
    if begin.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the content: fetch the file itself"
    return None


def disguise(begin: bytes) -> str | None:
    """What a file is that should hold weights and does not, by its first bytes; else None."""
    if what := stand_in(begin):
        return what
    if begin.startswith(b"GGUF"):
        return "a GGUF file: its name should end in .gguf"
    if begin.startswith(b"\x89HDF"):
        return "an HDF5 file (TensorFlow), which is not supported; use safetensors"
    return None


def _entries(header: dict[str, Any], begin: int) -> dict[str, Tensor]:
    """The tensors of a header; the numbers begin at byte `begin`."""
    tensors = {}
    for name, entry in header.items():
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if code not in _DTYPES:
            # Floats and ints of less than a byte, and of a byte with its scales elsewhere.
            kind = QUANTIZED if code[:2] in ("F8", "F6", "F4", "E8", "I4", "U4") else "unsupported"
            raise ValueError(f"tensor {name!r} has type {code}: {kind}")
        tensors[name] = tensor = Tensor(jnp.dtype(_DTYPES[code]), shape, begin + start)
        if not 0 <= start <= end or end - start != tensor.size * tensor.dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} and type {code} in bytes "
                             f"{start} to {end}")  # fmt: skip
    return tensors


class TensorFile:
    """Named tensors in a file, any range of which can be read or written by any thread.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.safetensors"
      >>> with TensorFile.create(path, {"w": Tensor(np.dtype("float32"), (2, 3))}) as file:
      ...     file.write("w", 2, np.float32([1, 2]))
      >>> with TensorFile(path) as file:
      ...     file.read("w", 0, 6).tolist()
      [0.0, 0.0, 1.0, 2.0, 0.0, 0.0]
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False):
        self.path = path
        self._file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        begin = b""
        try:
            begin, size = os.pread(self._file, 64, 0), os.fstat(self._file).st_size
            length = struct.unpack("<Q", begin[:8])[0]
            if length > size - 8:
                cut = "truncated, " if begin[8:9] == b"{" else ""
                raise ValueError(f"{cut}a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(os.pread(self._file, length, 8))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors = _entries(header, 8 + length)
        except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
            os.close(self._file)
            text = str(error)
            if begin.startswith((b"PK", b"\x80\x02")):
                text = "in PyTorch's own format: it should be called pytorch_model.bin"
            if QUANTIZED not in text:  # a sound file, of what nothing here can use
                text = f"not a safetensors file: {disguise(begin) or text}"
            raise ValueError(f"{path}: {text}") from error
        except OSError:
            os.close(self._file)
            raise

    def check_length(self) -> None:
        """Raise ValueError if the file ends before its last tensor does."""
        found = os.fstat(self._file).st_size
        ends = {t.offset + t.size * t.dtype.itemsize: name for name, t in self.tensors.items()}
        if (wanted := max(ends, default=0)) > found:
            raise ValueError(f"{self.path}: truncated before the end of {ends[wanted]!r}: expected "
                             f"{wanted:,} bytes, found {found:,}; fetch it again")  # fmt: skip

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> "TensorFile":
        """Make a file of zeros, to be written into."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        # Widest first, so that all are aligned, as the library does.
        for name, tensor in sorted(tensors.items(), key=lambda t: (-t[1].dtype.itemsize, t[0])):
            end = offset + tensor.size * tensor.dtype.itemsize
            header[name] = dict(
                dtype=_NAMES[tensor.dtype.name], shape=tensor.shape, data_offsets=[offset, end]
            )
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + offset)
        return cls(path, writable=True)

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Return `count` elements of a flattened tensor, from number `start` on."""
        tensor = self.tensors[name]
        return self._pull(name, tensor.offset + start * tensor.dtype.itemsize, count)

    def _pull(self, name: str, offset: int, count: int) -> np.ndarray:
        """Numbers of a tensor's type from a byte of the file on."""
        dtype = self.tensors[name].dtype
        raw = np.empty(count * dtype.itemsize, np.uint8)
        left = memoryview(raw.data)
        while left:
            done = os.preadv(self._file, [left], offset)
            if not done:
                raise ValueError(f"{self.path}: truncated inside {name!r}")
            left, offset = left[done:], offset + done
        return raw.view(dtype)

    def write(self, name: str, start: int, x: np.ndarray) -> None:
        """Write the elements of a flattened tensor from number `start` on."""
        tensor = self.tensors[name]
        data = memoryview(np.asarray(x, tensor.dtype).tobytes())
        offset = tensor.offset + start * tensor.dtype.itemsize
        while data:
            done = os.pwrite(self._file, data, offset)
            data, offset = data[done:], offset + done

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)
