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


class Tensor(NamedTuple):
    """Type, shape and place of a tensor in its file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0  # bytes from the file's beginning

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


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
        try:
            length = struct.unpack("<Q", os.pread(self._file, 8, 0))[0]
            header = json.loads(os.pread(self._file, length, 8))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self.tensors = {
                name: Tensor(
                    jnp.dtype(_DTYPES[entry["dtype"]]),
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (struct.error, ValueError, LookupError, TypeError, OverflowError) as error:
            os.close(self._file)
            raise ValueError(f"{path}: not a safetensors file: {error}") from error

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
        raw = np.empty(count * tensor.dtype.itemsize, np.uint8)
        left, offset = memoryview(raw.data), tensor.offset + start * tensor.dtype.itemsize
        while left:
            done = os.preadv(self._file, [left], offset)
            if not done:
                raise ValueError(f"{self.path}: truncated inside {name!r}")
            left, offset = left[done:], offset + done
        return raw.view(tensor.dtype)

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
