"""Folders of Hugging Face: which files they have, and in one line what is wrong with them."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hiso_jax._engine.tensorfile import QUANTIZED, TensorFile, stand_in
from hiso_jax.models.torchfile import TorchFile

SMALL_FILES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the small files of a folder (tokenizer, generation) that go with the weights."""
_TENSORS = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: a local one, or that of a hub id, downloaded if it must be.

    A GGUF file is a model of its own, and is returned as it is.

    Raises:
      FileNotFoundError: neither.
      ValueError: another file.
    """
    is_gguf = Path(path).suffix.lower() == ".gguf"
    if Path(path).is_dir() or (is_gguf and Path(path).is_file()):
        return Path(path)
    if is_gguf:
        raise FileNotFoundError(f"{path}: expected a GGUF file, there is none")
    if Path(path).exists():
        raise ValueError(f"{path}: expected a folder with config.json, found a file; give the "
                         f"folder it is in, {Path(path).parent}")  # fmt: skip
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: expected a folder with config.json, a .gguf file, or a "
                                "hub id org/name")  # fmt: skip
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = [f"*{suffix}" for suffix in SMALL_FILES]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an old one
            folder = Path(snapshot_download(str(path), allow_patterns=[*small, "pytorch_*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{path}: no such folder here, and the hub does not give it: {why}"
        ) from error
    return folder


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file that a path is, or that a folder has its weights in; else None.

    Raises:
      ValueError: the folder has several, or other weights too.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    entries = sorted(path.iterdir()) if path.is_dir() else []
    found = [entry for entry in entries if entry.suffix.lower() == ".gguf" and entry.is_file()]
    indices = [f"{name}.index.json" for name in _TENSORS]
    others = [entry for entry in entries if entry.name in (*_TENSORS, *indices)]
    if len(found) > 1 or (found and others):
        names = ", ".join(entry.name for entry in [*found, *others][:6])
        raise ValueError(f"{path}: expected one GGUF file and no other weights, found {names}; "
                         "give the GGUF file itself, or take away what is not meant")  # fmt: skip
    return found[0] if found else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
      ValueError: it holds something else.
    """
    content = path.read_bytes()
    try:
        read = json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{path}: not JSON: {stand_in(content[:64]) or f'{error}; fetch it again'}"
        ) from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(read).__name__}")
    return read


def _found(folder: Path) -> str:
    """The files of a folder in a few words."""
    names = sorted(entry.name for entry in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"found {', '.join(names[:8])}{more}" if names else "the folder is empty"


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json says, if it is of whole and plain weights.

    Of a GGUF file, what it says itself.

    Raises:
      FileNotFoundError: there is none.
      ValueError: broken, or of an adapter or a quantized model.
    """
    if file := gguf_of(folder):
        from hiso_jax.models import ggufconfig, gguffile  # a slow import, and only needed here

        with gguffile.GGUFFile(file) as opened:
            return ggufconfig.config_of(opened)
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.is_file() and not path.is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        raise ValueError(f"{folder}: an adapter (PEFT) of {base!r}, not a model: merge it into its "
                         "base first (merge_and_unload) and give the merged folder")  # fmt: skip
    if not path.is_file():
        inner = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
        hint = f"; perhaps you mean {inner[0].parent}" if inner else ""
        raise FileNotFoundError(
            f"{folder}: expected a folder with config.json, {_found(folder)}{hint}"
        )
    if adapter.is_file() and any(folder.glob("adapter_model.*")):
        raise ValueError(f"{folder}: an adapter (adapter_model) beside the weights: merge it into "
                         "them first, or take its files out of the folder")  # fmt: skip
    config = read_json(path)
    for key in ("quantization_config", "compression_config"):
        if own := config.get(key):
            named = isinstance(own, dict) and (own.get("quant_method") or own.get("format"))
            raise ValueError(
                f"{folder}: config.json has {key} ({named or own}): {QUANTIZED} (or, if these "
                f"weights are plain numbers all the same, take {key} out of it)"
            )
    if "model_type" not in config:
        raise ValueError(f"{path}: lacks model_type, which says what family it is of; add it")
    return config


def small_files(folder: Path) -> list[Path]:
    """The files that go with a folder's weights, relative to it: tokenizer, generation, and so on.

    Of a folder of sentence-transformers also all that is in the modules beside the model.
    """
    found = [p.name for p in folder.iterdir() if p.is_file() and p.suffix in SMALL_FILES]
    modules = folder / "modules.json"
    try:
        listed = json.loads(modules.read_bytes()) if modules.is_file() else []
        named = [str(module["path"]) for module in listed if module["path"]]
    except (ValueError, TypeError, KeyError):  # whose it is will say so
        named = []
    for name in named:
        inner = folder / name
        # Nothing above the folder, or deep in it.
        if Path(name).name == name != ".." and inner.is_dir():
            found += [f"{name}/{p.name}" for p in inner.iterdir() if p.is_file()]
    return [Path(name) for name in sorted(found)]


def _shards(index: Path) -> list[str]:
    """Names of the files that an index names.

    Raises:
      ValueError: it is no index.
    """
    parts = read_json(index).get("weight_map")
    named: set[Any] = set(parts.values()) if isinstance(parts, dict) and parts else {None}
    if not all(isinstance(name, str) and Path(name).name == name for name in named):
        raise ValueError(f"{index}: expected weight_map, from names of tensors to those of files")
    return sorted(named)


def weight_files(folder: Path) -> tuple[Callable[[Path], TensorFile], list[Path]]:
    """How to open a folder's weights, and where: one file, or those of its index.

    GGUF, safetensors, or, where there are none, PyTorch's own files. One whole file comes before an
    index, which may be that of older weights; so does transformers read such a folder.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: an index that is broken; a GGUF file beside other weights.
    """
    if file := gguf_of(folder):
        from hiso_jax.models.gguffile import GGUFFile  # a slow import, and only needed here

        return GGUFFile, [file]
    kinds: dict[str, Any] = dict(zip(_TENSORS, (TensorFile, TorchFile), strict=True))
    for name, kind in kinds.items():
        if (folder / name).is_file():
            return kind, [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            paths = [folder / part for part in _shards(index)]
            if absent := [str(path) for path in paths if not path.is_file()]:
                raise FileNotFoundError(
                    f"expected {', '.join(absent)}, which {index.name} names; copy them there"
                )
            return kind, paths
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    raise FileNotFoundError(
        f"expected {folder / 'model.safetensors'} (or its index, or pytorch_model.bin), "
        f"{f'found only {others}'[:300] if others else _found(folder)}"
    )


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, TensorFile]]:
    """Open a folder's weights; give tensor name -> file.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not what its name says, or truncated, or two have the same tensor.
    """
    kind, paths = weight_files(folder)
    there: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        for path in paths:
            file = stack.enter_context(kind(path))
            file.check_length()
            for name in file.tensors:
                if name in there:
                    other = Path(there[name].path).name
                    raise ValueError(f"{folder}: tensor {name!r} is in {other} and in {path.name}; "
                                     "keep one of them")  # fmt: skip
                there[name] = file
        yield there


def remove_shards(folder: Path) -> None:
    """Remove what an older model.safetensors.index.json names, and it: no reader shall take them.

    Only files that are called as shards are go with it, whatever else an index may name.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        parts = _shards(index)
    except ValueError:
        parts = []
    index.unlink()
    for part in parts:
        if part != "model.safetensors" and re.fullmatch(r"model[\w.-]*\.safetensors", part):
            (folder / part).unlink(missing_ok=True)
