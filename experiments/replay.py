"""Rebuild a fine-tuned model from its base and a ledger, and prove that it is the same.

    python -m experiments.replay LEDGER BASE OUT

LEDGER is a run's ledger.sqlite, or the ledger.safetensors that was sent. BASE is what the run
started from: a Hugging Face folder or GGUF file, or a .safetensors file whose tensors have the
leaves' names. OUT, which must not exist, becomes the same kind of thing; of GGUF, a folder.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

import hiso_jax as hj
from experiments import adapters, report
from hiso_jax import files
from hiso_jax.models import huggingface
from hiso_jax.replay import Leaf, Replay, large
from hiso_jax.tensorfile import Tensor, TensorFile


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


def rebuild(
    replay: Replay,
    pieces: list[Piece],
    base: dict[str, TensorFile],
    out: Path,
    step: Callable[[str, int], None],
) -> None:
    """Check the base, then write every file of `out`; raise LedgerMismatch if bits differ."""
    covered: dict[str, int] = {}
    for piece in pieces:
        size = int(np.prod(piece.shape, dtype=np.int64))
        covered[piece.leaf.name] = covered.get(piece.leaf.name, 0) + size
    if wrong := [name for name, leaf in replay.leaves.items() if covered.get(name) != leaf.size]:
        raise hj.LedgerMismatch(f"the base has leaves of other sizes: {', '.join(wrong[:3])}")
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
                       for n, t in file.tensors.items()}  # fmt: skip
            target = out / as_safetensors(path) if out.is_dir() else out
            made = TensorFile.create(target, tensors, file.metadata)
            written[path] = stack.enter_context(made)
            for name, tensor in file.tensors.items():
                for start in range(0, 0 if (path, name) in types else tensor.size, large()):
                    count = min(large(), tensor.size - start)
                    made.write(name, start, file.read(name, start, count))
        if extra:
            if not out.is_dir():
                raise hj.LedgerMismatch(f"the base lacks {', '.join(extra)}")
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
        raise hj.LedgerMismatch(f"the digest is {replay.digest}, the ledger's {replay.wanted}")


def as_safetensors(text: str) -> str:
    """Names of files in other formats as those of the safetensors they become."""
    if text.lower().endswith(".gguf"):
        return "model.safetensors"
    return text.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def open_ledger(path: Path) -> hj.Ledger:
    """Open a ledger, or the compact file of one."""
    with open(path, "rb") as file:
        if file.read(16).startswith(b"SQLite"):
            return hj.Ledger.open(path, read_only=True)
    return hj.Ledger.import_(path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path` and rename it on success."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield part
        with contextlib.suppress(OSError):  # some mounts have no modes
            part.chmod(0o755)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def run(ledger_path: Path, base_path: Path, out: Path) -> None:
    """Replay with a progress bar and print what was proved."""
    if out.exists():
        raise FileExistsError(f"{out} exists; nothing is written over")
    folder = base_path.is_dir() or base_path.suffix.lower() == ".gguf"
    kind, paths = huggingface.weight_files(base_path) if folder else (TensorFile, [base_path])
    if not paths[0].is_file():
        raise FileNotFoundError(f"{base_path}: no such file or folder")
    begin = time.perf_counter()
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(open_ledger(ledger_path))
        if not ledger.rounds:
            raise ValueError(f"{ledger_path}: no rounds are in it, there is nothing to replay")
        replay = Replay(ledger)
        base = {path.name: stack.enter_context(kind(path)) for path in paths}
        for file in base.values():
            file.check_length()
        if folder:
            config = huggingface.read_config(base_path)
            pieces = folder_pieces(replay.leaves, base, config["num_hidden_layers"])
        else:
            pieces = flat_pieces(replay.leaves, base)
        bar = stack.enter_context(report.progress("{task.percentage:>3.0f}%"))
        size = sum(leaf.size for leaf in replay.leaves.values())
        tasks = {name: bar.add_task(name, total=size, status="", visible=False)
                 for name in ("reading the base", "replaying")}  # fmt: skip

        def step(name: str, count: int) -> None:
            bar.update(tasks[name], advance=count, visible=True)

        made = stack.enter_context((whole_folder if folder else files.whole)(out))
        rebuild(replay, pieces, base, made, step)
        if file := huggingface.gguf_of(base_path):
            dtype = next(piece.leaf.dtype for piece in pieces if piece.file)
            huggingface.save_small(file, made, str(dtype))
        for small in base_path.iterdir() if folder and not file else ():
            if small.is_file() and small.suffix in huggingface.SMALL_FILES:
                if small.name.endswith(".index.json"):
                    if paths[0].name in ("model.safetensors", "pytorch_model.bin"):
                        continue  # a stale one: the weights are in a file that needs none
                    index = as_safetensors(small.read_text())
                    (made / as_safetensors(small.name)).write_text(index)
                else:
                    shutil.copyfile(small, made / small.name)
        said = _finish(ledger, base_path, made)
    seconds = time.perf_counter() - begin
    report.say(
        f"{ledger.rounds} rounds, {ledger_path.stat().st_size:,} bytes, {size:,} parameters: "
        f"{seconds:.1f} s"
    )
    if replay.wanted is None:
        report.say(f"digest {replay.digest}; the ledger has none to compare with")
    else:
        report.say(f"digest {replay.digest}: equal to the ledger's, bit for bit", style="green")
    if said:
        report.say(said)
    report.say("Written to ", str(out))


def _finish(ledger: hj.Ledger, base: Path, made: Path) -> str:
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


def main(
    ledger: Annotated[Path, tyro.conf.arg(metavar="LEDGER")],
    base: Annotated[Path, tyro.conf.arg(metavar="BASE")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Rebuild a fine-tuned model from its base and its ledger.

    Args:
      ledger: ledger.sqlite of a run, or the ledger.safetensors that was sent.
      base: what the run started from: a Hugging Face folder, GGUF or .safetensors file.
      out: where to write the fine-tuned one; must not exist.
    """
    try:
        run(ledger, base, out)
    except (OSError, ValueError, hj.LedgerError) as error:
        report.fail(error)
        sys.exit(1)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
