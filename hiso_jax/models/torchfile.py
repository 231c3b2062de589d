"""PyTorch's own checkpoints, read without PyTorch: older models on the hub have nothing else.

Such a file is a pickle that says what there is, and raw numbers: in a zip archive, or, as
PyTorch wrote it before 1.6, one after the other. Only the few names that a dict of tensors needs
are let through, so a pickle cannot run anything.
"""

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hiso_jax._engine.tensorfile import QUANTIZED, Tensor, TensorFile, disguise

_STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
             "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
             "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
             "BoolStorage": "bool"}  # fmt: skip
_MAGIC = 0x1950A86A20F9469CFC6C  # what a file of before 1.6 begins with
# How PyTorch saves the types that have no storage class of their own: 8-bit floats, codes.
_NARROW = ("_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_wrapper_subclass")

# What reading a damaged file raises.
_BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
           EOFError, struct.error)  # fmt: skip


class _Storage(NamedTuple):
    dtype: Any
    key: str
    begin: int = 0  # first element: older files had views of storages


class _View(NamedTuple):
    """A tensor as the pickle has it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from its first to its last."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


def _rebuild(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _View:
    del rest
    return _View(storage, storage.begin + offset, tuple(shape), tuple(stride))


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")  # of Python 2's strings
        self.dtypes: dict[str, Any] = {}  # of storages, by key

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return jnp.dtype(_STORAGES[name])
        if name in _NARROW or name.startswith("float8"):
            raise pickle.UnpicklingError(f"{module}.{name} makes tensors of {QUANTIZED}")
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a dict of tensors")
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, _, *view = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"{kind!r} has no place in a dict of tensors")
        self.dtypes[str(key)] = dtype
        begin = view[0][1] if view and view[0] else 0
        return _Storage(dtype, str(key), begin)


def _zipped(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Content of an archive, and where the numbers of each storage begin and end in it."""
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"expected one data.pkl in the archive, found {names}")
        root = names[0].removesuffix("data.pkl")
        order = f"{root}byteorder"  # newer archives have it
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        with archive.open(names[0]) as part:
            unpickler = _Unpickler(part)
            content = unpickler.load()
        places = {}
        for key in unpickler.dtypes:
            info = archive.getinfo(f"{root}data/{key}")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename!r} is compressed")
            file.seek(info.header_offset + 26)  # two lengths in the archive's local header
            name, extra = struct.unpack("<HH", file.read(4))
            begin = info.header_offset + 30 + name + extra
            places[key] = (begin, begin + info.file_size)
    return content, places


def _plain(file: IO[bytes]) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of a file of before PyTorch 1.6: pickles, then each storage's count and numbers."""
    magic, _, system = (_Unpickler(file).load() for _ in range(3))
    if magic != _MAGIC:
        raise ValueError("it does not begin as one")
    if not system.get("little_endian", True):
        raise ValueError("its numbers are big-endian")
    unpickler = _Unpickler(file)
    content, keys = unpickler.load(), _Unpickler(file).load()
    begin, places = file.tell(), {}
    for key in map(str, keys):
        file.seek(begin)
        (count,) = struct.unpack("<q", file.read(8))
        places[key] = (begin + 8, begin + 8 + count * unpickler.dtypes[key].itemsize)
        begin = places[key][1]
    size = file.seek(0, os.SEEK_END)
    if begin > size:
        raise ValueError(f"truncated: expected {begin:,} bytes, found {size:,}")
    return content, places


def _views(content: Any) -> Mapping[str, _View]:
    """The dict of tensors that a file is, or holds beside other things.

    Raises:
      ValueError: there are none, or several, or entries that are no tensors, by name.
    """
    if not isinstance(content, dict):
        what = "tensor" if isinstance(content, _View) else type(content).__name__
        raise ValueError(f"expected a dict of tensors, found a {what}")
    has = lambda own: isinstance(own, dict) and any(isinstance(x, _View) for x in own.values())  # noqa: E731
    if not has(content):
        inner = [key for key, own in content.items() if has(own)]
        if len(inner) != 1:
            what = f"several dicts of tensors, {inner}" if inner else f"no tensors: {list(content)}"
            raise ValueError(f"it holds {what:.300}; save model.state_dict() alone")
        content = content[inner[0]]
    named = {key for key, x in content.items() if isinstance(x, _View) and isinstance(key, str)}
    if others := [key for key in content if key not in named]:
        raise ValueError(f"{others!r:.300} are no named tensors; save model.state_dict() alone")
    return content


class TorchFile(TensorFile):
    """The tensors of a ``pytorch_model.bin``, read like those of a `TensorFile`.

    A dict of tensors under a key (``state_dict``), with whatever else a training run kept beside
    it, is taken as that dict; tensors that are not contiguous are read as what they are.

    Raises:
      ValueError: not such a file, truncated, or it holds something else than named tensors.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self.metadata, self.tensors = path, {}, {}
        self._strides: dict[str, tuple[int, ...]] = {}
        begin = b""
        try:
            with open(path, "rb") as file:
                begin = file.read(64)
                file.seek(0)
                content, places = (_zipped if begin.startswith(b"PK") else _plain)(file)
            for name, view in _views(content).items():
                first, last = places[view.storage.key]
                size = view.storage.dtype.itemsize
                if first + (view.offset + view.span) * size > last:
                    raise ValueError(f"{name!r} goes beyond its numbers: truncated or damaged")
                place = first + view.offset * size
                self.tensors[name] = Tensor(view.storage.dtype, view.shape, place)
                if not _contiguous(view.shape, view.stride):
                    self._strides[name] = view.stride
        except (*_BROKEN, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            text = disguise(begin)
            if begin[8:9] == b"{":
                text = "a safetensors file: it should be called model.safetensors"
            if isinstance(error, zipfile.BadZipFile | EOFError | struct.error):
                text = f"truncated or damaged: {error or 'it ends too early'}; fetch it again"
            raise ValueError(
                f"{path}: not a dict of tensors saved by PyTorch: {text or error}"
            ) from error
        self._file = os.open(path, os.O_RDONLY)

    def check_length(self) -> None:
        """Nothing: it was done on opening, storage by storage."""

    def is_strided(self, name: str) -> bool:
        """Whether any part of a tensor has to be taken from all of its numbers."""
        return name in self._strides

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        """Return `count` elements of a flattened tensor, from number `start` on."""
        if name not in self._strides:
            return super().read(name, start, count)
        tensor, strides = self.tensors[name], self._strides[name]
        span = _View(_Storage(tensor.dtype, ""), 0, tensor.shape, strides).span
        held = self._pull(name, tensor.offset, span)
        steps = [step * tensor.dtype.itemsize for step in strides]
        whole = np.lib.stride_tricks.as_strided(held, tensor.shape, steps, writeable=False)
        return whole.reshape(-1)[start : start + count]


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and step != expected:
            return False
        expected *= size
    return True
