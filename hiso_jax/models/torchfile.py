"""PyTorch's own checkpoints, read without PyTorch: older models on the hub have nothing else.

Such a file is a zip archive of raw numbers and of a pickle that says what they are. Only the
few names that a dict of tensors needs are let through, so a pickle cannot run anything.
"""

import collections
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from hiso_jax.tensorfile import Tensor, TensorFile

_STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
             "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
             "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
             "BoolStorage": "bool"}  # fmt: skip


class _Storage(NamedTuple):
    dtype: Any
    key: str


def _rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Any:
    del rest
    return storage, offset, tuple(shape), tuple(stride)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return jnp.dtype(_STORAGES[name])
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a dict of tensors")
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        return _Storage(pid[1], str(pid[2]))


class TorchFile(TensorFile):
    """The tensors of a ``pytorch_model.bin``, read like those of a `TensorFile`.

    Raises:
      ValueError: not such a file, or one that holds something else than contiguous tensors.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.metadata, self.tensors = path, {}, {}
        try:
            with zipfile.ZipFile(path) as archive:
                (index,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                with archive.open(index) as file:
                    content = _Unpickler(file).load()
                root = index.removesuffix("data.pkl")
                for name, value in content.items():
                    storage, offset, shape, stride = value
                    info = archive.getinfo(f"{root}data/{storage.key}")
                    if info.compress_type != zipfile.ZIP_STORED or not _contiguous(shape, stride):
                        raise ValueError(f"{name!r} is compressed or not contiguous")
                    begin = _begin(Path(path), info.header_offset)
                    place = begin + offset * storage.dtype.itemsize
                    self.tensors[name] = Tensor(storage.dtype, shape, place)
        except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, TypeError, LookupError,
                AttributeError, EOFError) as error:  # fmt: skip
            raise ValueError(f"{path}: not a dict of tensors saved by PyTorch: {error}") from error
        self._file = os.open(path, os.O_RDONLY)


def _begin(path: Path, header: int) -> int:
    """Where the numbers begin, behind the archive's local header."""
    with open(path, "rb") as file:
        file.seek(header + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return header + 30 + name + extra


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
