"""A fine-tuned model from its base and a ledger, and the proof that it is the same bit for bit.

Example:
  >>> from hiso_jax.ledger import rebuild
  >>> rebuild.rebuild("run.sqlite", "gone", "out")
  Traceback (most recent call last):
      ...
  FileNotFoundError: gone: no such file or folder
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hiso_jax._engine import files
from hiso_jax._engine.tensorfile import Tensor, TensorFile
from hiso_jax.ledger.replay import Leaf, Replay, large
from hiso_jax.ledger.store import Ledger
from hiso_jax.ledger.tables import LedgerMismatch
from hiso_jax.models import adapters, configs, folders, huggingface, names
from hiso_jax.rules import Rule

COPIES = frozenset((*names.TIED, *names.TIED_BIASES))
"""Tensors that are the embeddings once more, where they are no leaf of the model."""


class Piece(NamedTuple):
    """A whole tensor in a file, and where in which leaf its numbers are."""

    leaf: Leaf
    start: int  # in the flattened leaf
    file: str | None  # None: a leaf that is not in the base, zeros
    tensor: str
    shape: tuple[int, ...]  # in the file
    turned: bool  # the file has it transposed

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, count) of what is worked on at a time; a turned tensor cannot be cut."""
        size = int(np.prod(self.shape, dtype=np.int64))
        room = size if self.turned else large()
        for start in range(0, size, max(room, 1)):
            yield start, min(room, size - start)


def flat_pieces(leaves: dict[str, Leaf], base: dict[str, TensorFile]) -> list[Piece]:
    """Tensors of a file whose names are the leaves'; leaves that are not in it are zeros."""
    where = {name: path for path, file in base.items() for name in file.tensors}
    return [Piece(leaf, 0, where.get(n), n, leaf.shape, False) for n, leaf in leaves.items()]


def folder_pieces(leaves: dict[str, Leaf], base: dict[str, TensorFile], layers: int) -> list[Piece]:
    """Tensors of a Hugging Face folder, found under the prefix that explains most leaves."""
    where = {name: path for path, file in base.items() for name in file.tensors}

    def found(prefix: str) -> dict[str, list[str]]:
        names = {}
        for leaf in leaves:
            if leaf.startswith(prefix):
                own = huggingface.tensor_names(leaf.removeprefix(prefix), layers)
                names[leaf] = [n for name in own if (n := huggingface.find(name, where))]
                if len(names[leaf]) < len(own):
                    del names[leaf]
        return names

    starts = {leaf[: i + 1] for leaf in leaves for i, letter in enumerate(leaf) if letter == "/"}
    best = max((found(prefix) for prefix in sorted({"", *starts})), key=len)
    pieces = []
    for name, leaf in leaves.items():
        start = 0
        for tensor in best.get(name, []):
            file = where[tensor]
            shape, turned = base[file].tensors[tensor].shape, huggingface.is_turned(name)
            pieces.append(Piece(leaf, start, file, tensor, shape, turned))
            start += base[file].tensors[tensor].size
        if name not in best:
            pieces.append(Piece(leaf, 0, None, name, leaf.shape, False))
    return pieces


def load(piece: Piece, base: dict[str, TensorFile], start: int, count: int) -> np.ndarray:
    """Numbers of a chunk in the order and type of the leaf."""
    if piece.file is None:
        return np.zeros(count, piece.leaf.dtype)
    x = base[piece.file].read(piece.tensor, start, count)
    x = x.reshape(piece.shape).T.reshape(-1) if piece.turned else x
    return x.astype(piece.leaf.dtype)


def _write(
    replay: Replay,
    pieces: list[Piece],
    base: dict[str, TensorFile],
    out: Path,
    copies: frozenset[str],
    step: Callable[[str, int], None],
) -> None:
    """Check the base, then write every file of `out`; raise LedgerMismatch if bits differ."""
    covered: dict[str, int] = {}
    for piece in pieces:
        size = int(np.prod(piece.shape, dtype=np.int64))
        covered[piece.leaf.name] = covered.get(piece.leaf.name, 0) + size
    if wrong := [name for name, leaf in replay.leaves.items() if covered.get(name) != leaf.size]:
        raise LedgerMismatch(f"the base has leaves of other sizes: {', '.join(wrong[:3])}")
    work = [(piece, *chunk) for piece in pieces for chunk in piece.chunks()]

    def read(piece: Piece, start: int, count: int) -> None:
        x = load(piece, base, start, count)
        replay.read(piece.leaf.name, piece.start + start, x)
        step("reading the base", count)

    extra = {p.tensor: Tensor(p.leaf.dtype, p.shape) for p in pieces if p.file is None}
    types = {(p.file, p.tensor): p.leaf.dtype for p in pieces}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        list(pool.map(read, *zip(*work, strict=True)))
        replay.check_base()
        written: dict[str | None, TensorFile] = {}
        for path, file in base.items():
            tensors = {n: t._replace(dtype=types.get((path, n), t.dtype))
                       for n, t in file.tensors.items() if n not in copies}  # fmt: skip
            target = out / _as_safetensors(path) if out.is_dir() else out
            # What else a folder's file says of itself, a saved model does not.
            said = {"format": "pt"} if out.is_dir() else file.metadata
            made = TensorFile.create(target, tensors, said)
            written[path] = stack.enter_context(made)
            for name, tensor in file.tensors.items():
                kept = (path, name) not in types and name not in copies
                for start in range(0, tensor.size if kept else 0, large()):
                    count = min(large(), tensor.size - start)
                    made.write(name, start, file.read(name, start, count))
        if extra:
            if not out.is_dir():
                raise LedgerMismatch(f"the base lacks {', '.join(extra)}")
            written[None] = stack.enter_context(TensorFile.create(out / "extra.safetensors", extra))

        def advance(piece: Piece, start: int, count: int) -> None:
            x = load(piece, base, start, count)
            if piece.leaf.trainable:
                x = replay.advance(piece.leaf.name, piece.start + start, x)
            x = x.reshape(piece.shape[::-1]).T if piece.turned else x
            written[piece.file].write(piece.tensor, start, x.reshape(-1))
            step("replaying", count)

        list(pool.map(advance, *zip(*work, strict=True)))
    if replay.wanted not in (None, replay.digest):
        raise LedgerMismatch(f"the digest is {replay.digest}, the ledger's {replay.wanted}")


def _as_safetensors(text: str) -> str:
    """Names of files in other formats as those of the safetensors they become."""
    if text.lower().endswith(".gguf"):
        return "model.safetensors"
    return text.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def open_ledger(path: Path) -> Ledger:
    """Open a ledger, or the compact file of one."""
    with open(path, "rb") as file:
        if file.read(16).startswith(b"SQLite"):
            return Ledger.open(path, read_only=True)
    ledger = Ledger.import_(path)
    ledger.path = str(path)  # for messages, to which ":memory:" would be no name
    return ledger


class Rebuilt(NamedTuple):
    """What was rebuilt and what that proves."""

    rounds: int
    parameters: int
    digest: str  # of the state that was reached
    proved: bool  # the ledger has a digest of it, which is the same
    note: str  # how what was trained beside the weights was merged, if something was


def rebuild(
    ledger: str | Path,
    base: str | Path,
    out: str | Path,
    on_step: Callable[[str, int, int], None] = lambda what, count, total: None,
    rule: Rule | None = None,
) -> Rebuilt:
    """Rebuild a fine-tuned model from its base and its ledger.

    Args:
      ledger: ledger.sqlite of a run, or the ledger.safetensors that was sent.
      base: what the run started from: a Hugging Face folder or GGUF file, or a .safetensors file
        whose tensors have the leaves' names.
      out: becomes the same kind of thing, a folder for GGUF, whole or not at all; must not exist.
      on_step: called with what is done, how many parameters are, and how many there are in all;
        from several threads.
      rule: yours, if the ledger's is none of `hiso_jax.rules.RULES`.

    Raises:
      FileExistsError: `out` exists.
      FileNotFoundError: `ledger` or `base` does not.
      LedgerMismatch: the base is another, or the digest differs in the end.
      ValueError: there is nothing to replay.
    """
    ledger, base, out = Path(ledger), Path(base), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing is written over")
    folder = base.is_dir() or base.suffix.lower() == ".gguf"
    kind, paths = huggingface.weight_files(base) if folder else (TensorFile, [base])
    if not paths[0].is_file():
        raise FileNotFoundError(f"{base}: no such file or folder")
    if not ledger.is_file():
        raise FileNotFoundError(f"{ledger}: no such file")
    with contextlib.ExitStack() as stack:
        records = stack.enter_context(open_ledger(ledger))
        if not records.rounds:
            raise ValueError(f"{ledger}: no rounds are in it, there is nothing to replay")
        replay = Replay(records, rule)
        opened = {path.name: stack.enter_context(kind(path)) for path in paths}
        for file in opened.values():
            file.check_length()
        if folder:
            config = huggingface.read_config(base)
            pieces = folder_pieces(replay.leaves, opened, config.get("num_hidden_layers", 0))
        else:
            pieces = flat_pieces(replay.leaves, opened)
        size = sum(leaf.size for leaf in replay.leaves.values())
        place = files.whole_folder(out) if folder else files.atomic_write(out, sweeps=True)
        made = stack.enter_context(place)
        # A reader that finds the base's beside what has moved takes them for a head of their own.
        copies = COPIES.difference(p.tensor for p in pieces) if folder else frozenset()
        step = lambda what, count: on_step(what, count, size)  # noqa: E731
        _write(replay, pieces, opened, made, copies, step)
        if folder:
            dtype = str(next(piece.leaf.dtype for piece in pieces if piece.file))
            if file := huggingface.gguf_of(base):
                huggingface.save_small(file, made, dtype)
            else:
                _copy_small_files(base, paths, made, dtype, copies)
        note = _finish(records, base, made)
        return Rebuilt(records.rounds, size, replay.digest, replay.wanted is not None, note)


def _copy_small_files(
    base: Path, weights: list[Path], made: Path, dtype: str, copies: frozenset[str]
) -> None:
    """Copy the tokenizer and the like; config and index are those of the weights written."""
    for small in folders.small_files(base):
        if not small.name.endswith(".index.json") and str(small) != "config.json":
            (made / small).parent.mkdir(exist_ok=True)
            shutil.copyfile(base / small, made / small)
    config = configs.with_dtype(huggingface.read_config(base), dtype)
    (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    kind = "model.safetensors" if weights[0].suffix == ".safetensors" else "pytorch_model.bin"
    if weights[0].name != kind:  # or its index, if there is one, is that of older weights
        index = folders.read_json(base / f"{kind}.index.json")
        index["weight_map"] = {
            name: _as_safetensors(part)
            for name, part in index["weight_map"].items()
            if name not in copies
        }
        (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _finish(ledger: Ledger, base: Path, made: Path) -> str:
    """Make a whole model of weights and what was trained beside them; say what was done."""
    if not (made / "extra.safetensors").exists():
        return ""
    adapter = ledger.header["about"].get("train")
    if adapter is None:
        return (
            "The weights are those of the base: what was trained is beside them, in "
            "extra.safetensors; this ledger, of an earlier version, does not say how to merge it"
        )
    return adapters.finish(adapter, base, made)
