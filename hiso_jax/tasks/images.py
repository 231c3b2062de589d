"""Images from files: IDX (MNIST and its kin), CIFAR-10, or a folder of images per class."""

import collections
import gzip
import pickle
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hiso_jax._engine import checks
from hiso_jax.federation import Arrays
from hiso_jax.tasks.data import SPELLINGS, check_text

DEV = 2_000
"""Training images at most that are held out for dev, where a data set has no dev split."""
KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of files that are read as images."""
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Images(NamedTuple):
    """What was found."""

    parts: dict[str, Arrays]  # train, dev and test; columns image uint8 [N, H, W, C] and label
    classes: tuple[str, ...]  # in the order of the numbers of their labels
    notes: tuple[str, ...] = ()  # what was not read, or done otherwise than one may think


def read(folder: Path, size: int = 32) -> Images:
    """Read what a folder has, by the names of its files.

    Args:
      folder: with the four IDX files of MNIST, the files of CIFAR-10, or a folder per class,
        directly or below ``train``, ``dev`` and ``test``.
      size: height and width that images of a folder per class are scaled to.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: nothing of that kind is in it, or something in it cannot be read; says what.
    """
    if not folder.is_dir():
        what = "that is a file" if folder.exists() else "there is none"
        raise FileNotFoundError(f"--data: expected a folder of images, {what}: {folder}")
    if any("-ubyte" in path.name for path in folder.iterdir()):
        return of_idx(folder)
    if any(path.name.startswith(("data_batch_", "test_batch")) for path in folder.iterdir()):
        return of_cifar(folder)
    return of_folders(folder, size)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not.

    Raises:
      ValueError: it is something else, or cut off.
    """
    try:
        data = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from None
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes, got {data[:4].hex()}")
    rank = data[3]
    if len(data) < 4 + 4 * rank:
        raise ValueError(f"{path}: cut off within its sizes")
    shape = tuple(np.frombuffer(data, ">u4", rank, 4).tolist())
    if len(data) - 4 - 4 * rank != np.prod(shape):
        raise ValueError(f"{path}: expected {shape} bytes, got {len(data) - 4 - 4 * rank}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def of_idx(folder: Path) -> Images:
    """The four files of MNIST, or of a data set in its form."""
    whole = {}
    for part, stem in (("train", "train"), ("test", "t10k")):
        kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
        paths = [folder / f"{stem}-{kind}{end}" for kind in kinds for end in ("", ".gz")]
        there = [path for path in paths if path.is_file()]
        if [path.name.partition(".")[0] for path in there] != [f"{stem}-{k}" for k in kinds]:
            raise ValueError(
                f"--data: {folder} lacks {stem}-images-idx3-ubyte or {stem}-labels-idx1-ubyte, "
                f"each gzipped or not, and not both; there are {[path.name for path in there]}"
            )
        whole[part] = read_idx(there[0]), read_idx(there[1])
    return of_arrays(whole, str(folder))


def of_arrays(whole: Mapping[str, tuple[Any, Any]], where: str) -> Images:
    """Gray images [N, 28, 28] and their labels from 0 to 9, of train and test.

    Raises:
      ValueError: they are none.
    """
    parts = {}
    for part, (x, y) in whole.items():
        x, y = np.asarray(x), np.asarray(y)
        if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or not len(y) or y.max() > 9:
            raise ValueError(
                f"--data: expected images [N, 28, 28] and N labels from 0 to 9 in {where}, got "
                f"{x.shape} and {y.shape} up to {y.max(initial=0)}"
            )
        parts[part] = {"image": x.astype(np.uint8)[..., None], "label": y.astype(np.int32)}
    return Images(_complete(parts), tuple(map(str, range(10))))


def of_hub(name: str = "ylecun/mnist") -> Images:
    """MNIST from the hub.

    Raises:
      FileNotFoundError: the hub does not give it.
    """
    import datasets

    try:
        found = datasets.load_dataset(name).with_format("numpy")
    except Exception as error:  # whatever the hub's client raises
        raise FileNotFoundError(
            f"--data: no folder given, and the hub gave no MNIST: {error}"
        ) from None
    whole = {part: (found[part]["image"], found[part]["label"]) for part in ("train", "test")}
    return of_arrays(whole, name)


_NEEDED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """Of the pickles that CIFAR-10 comes in: lists and arrays, so nothing else is let through."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NEEDED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in CIFAR-10")
        return super().find_class(module, name)


def _batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels [N] of a file of CIFAR-10."""
    try:
        if path.suffix == ".bin":
            rows = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 3073)
            label, flat = rows[:, 0], rows[:, 1:]
        else:
            with open(path, "rb") as file:
                found = _Unpickler(file, encoding="bytes").load()
            label, flat = np.asarray(found[b"labels"]), np.asarray(found[b"data"])
        if flat.dtype != np.uint8 or flat.shape != (len(label), 3072) or not len(label):
            raise ValueError(f"its images are {flat.dtype} {flat.shape}")
        if label.dtype.kind not in "iu" or label.min() < 0 or label.max() > 9:
            raise ValueError("its labels are not whole numbers from 0 to 9")
    except (ValueError, TypeError, LookupError, EOFError, AttributeError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise ValueError(f"{path}: not a file of CIFAR-10: {error}") from None
    return flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), label.astype(np.int32)


def of_cifar(folder: Path) -> Images:
    """CIFAR-10: the six files of its binary version, or of the one for Python."""
    parts = {}
    for end in (".bin", ""):
        files = {"train": [folder / f"data_batch_{i}{end}" for i in range(1, 6)],
                 "test": [folder / f"test_batch{end}"]}  # fmt: skip
        lost = [path.name for own in files.values() for path in own if not path.is_file()]
        if not lost:
            break
    else:
        raise ValueError(f"--data: {folder} lacks {', '.join(lost)} of CIFAR-10")
    for part, paths in files.items():
        images, labels = zip(*map(_batch, paths), strict=True)
        parts[part] = {"image": np.concatenate(images), "label": np.concatenate(labels)}
    return Images(_complete(parts), CIFAR)


def _complete(parts: dict[str, Arrays]) -> dict[str, Arrays]:
    """All three parts; those that are missing are taken from train."""
    parts = dict(parts)
    if "test" not in parts:
        parts["train"], parts["test"] = _held_out(parts["train"], 0.15)
    if "dev" not in parts:
        parts["train"], parts["dev"] = _held_out(parts["train"], 0.15)
    return {name: parts[name] for name in ("train", "dev", "test")}


def _held_out(whole: Arrays, share: float) -> tuple[Arrays, Arrays]:
    count = len(whole["label"])
    order = np.random.default_rng(0).permutation(count)
    cut = max(min(DEV, int(share * count)), 1)
    take = lambda picks: {k: v[picks] for k, v in whole.items()}  # noqa: E731
    return take(np.sort(order[cut:])), take(order[:cut])


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, less hidden files and what systems leave there."""
    left = {"thumbs.db", "desktop.ini", "__macosx"}
    return sorted(p for p in folder.iterdir() if p.name[0] != "." and p.name.lower() not in left)


def _classes_of(folder: Path, notes: list[str], names: dict[str, str]) -> dict[str, list[Path]]:
    """The image files of each folder in a folder; deeper ones count for the one above.

    Unicode writes one name in several ways: each is as it first was, which `names` remembers.
    """
    entries = _visible(folder)
    if loose := [p.name for p in entries if p.is_file() and p.suffix.lower() in KINDS]:
        raise ValueError(
            f"--data: {folder}: expected a folder for each class, found images beside them: "
            f"{', '.join(loose[:3])}{f' and {len(loose) - 3} more' if len(loose) > 3 else ''}"
        )
    found: dict[str, list[Path]] = {}
    others: collections.Counter[str] = collections.Counter()
    for entry in filter(Path.is_dir, entries):
        check_text(f"--data: {folder}: the name of a folder", entry.name)
        name = names.setdefault(checks.nfc(entry.name), entry.name)
        own, todo = found.get(name, []), [entry]
        while todo:
            for path in _visible(todo.pop()):
                if path.is_dir() and not path.is_symlink():
                    todo.append(path)
                elif path.suffix.lower() in KINDS:
                    own.append(path)
                else:
                    others[path.suffix.lower() or path.name] += 1
        found[name] = sorted(own)
    if others:
        shown = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4))
        notes.append(f"{folder.name}: files that are no images were not read: {shown}")
    if empty := [name for name, own in found.items() if not own]:
        raise ValueError(f"--data: {folder}: no image in {', '.join(empty[:5])}, only files with "
                         f"the suffixes {', '.join(KINDS)} are read")  # fmt: skip
    return found


def of_folders(folder: Path, size: int) -> Images:
    """A folder of images per class; or one for train, dev and test, each with those.

    Every image is turned as its camera says, made RGB (what is transparent becomes white) and
    scaled to `size` x `size`.
    """
    notes: list[str] = []
    where = _splits(folder, notes) or {"train": folder}
    names: dict[str, str] = {}
    order = sorted(where, key=lambda part: part != "train")  # whose names are the classes
    found = {part: _classes_of(where[part], notes, names) for part in order}
    classes = sorted(found["train"], key=_natural)
    if len(classes) < 2:
        what = f"only {classes[0]!r}" if classes else "none"
        raise ValueError(f"--data: {folder}: expected a folder for each of two classes or more, "
                         f"each with images; found {what}")  # fmt: skip
    parts, unreadable = {}, []
    for part, own in found.items():
        if unknown := own.keys() - set(classes):
            raise ValueError(f"--data: {where[part]}: {', '.join(sorted(unknown)[:5])} is no class "
                             f"of train, which has {', '.join(classes)[:200]}")  # fmt: skip
        pairs = [(path, classes.index(name)) for name in classes for path in own.get(name, [])]
        images = np.zeros((len(pairs), size, size, 3), np.uint8)
        for i, (path, _) in enumerate(pairs):
            try:
                images[i] = picture(path, size)
            except ValueError as error:
                unreadable.append(str(error))
        parts[part] = {"image": images, "label": np.array([y for _, y in pairs], np.int32)}
    if unreadable:
        more = f"; and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        many, them = ("image", "it") if len(unreadable) == 1 else ("images", "them")
        raise ValueError(f"--data: {len(unreadable)} {many} cannot be read, take {them} out or "
                         f"fetch {them} again: {'; '.join(unreadable[:3])}{more}")  # fmt: skip
    if (count := len(parts["train"]["label"])) < 8 and len(parts) < 3:
        raise ValueError(f"--data: {folder}: {count} images are too few to take dev and test from")
    return Images(_complete(parts), tuple(classes), tuple(notes))


def _splits(folder: Path, notes: list[str]) -> dict[str, Path]:
    """The folders of train, dev and test, if there are such: those that hold folders of classes.

    A class may be called "train" as well: its folder holds images.

    Raises:
      ValueError: two folders are of one split, or there is a dev or a test and no train.
    """
    found: dict[str, Path] = {}
    others = []
    for path in filter(Path.is_dir, _visible(folder)):
        inside = _visible(path)
        holds = any(map(Path.is_dir, inside)) and not any(p.suffix.lower() in KINDS for p in inside)
        part = next((n for n, own in SPELLINGS.items() if path.name.casefold() in own), None)
        if part is None or not holds:
            others.append(path.name)
        elif part in found:
            raise ValueError(f"--data: {folder}: {found[part].name} and {path.name} are both of "
                             f"{part}; leave one there, or join them")  # fmt: skip
        else:
            found[part] = path
    if not found:
        return {}
    if "train" not in found:
        there = ", ".join(path.name for path in found.values())
        raise ValueError(f"--data: {folder}: expected a folder train with a folder for each class "
                         f"beside {there}, which have those")  # fmt: skip
    if others:
        notes.append(f"{folder.name}: folders that are no split were not read: "
                     f"{', '.join(others[:4])}{' ...' * (len(others) > 4)}")  # fmt: skip
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts 2 before 10."""
    return [(0, int(x), "") if x.isdecimal() else (1, 0, x) for x in re.split(r"(\d+)", name) if x]


def picture(path: Path, size: int) -> np.ndarray:
    """One image file as uint8 [size, size, 3].

    Raises:
      ValueError: it is none, or cut off, or so large that it may be meant to harm.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image: Any = ImageOps.exif_transpose(opened)
                image.load()
        if image.mode.startswith(("I", "F")):  # 16 bits or more
            image = Image.fromarray(_to_bytes(np.asarray(image)))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError,
            Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # fmt: skip
        raise ValueError(
            f"{path}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    return np.asarray(image)


def _to_bytes(x: np.ndarray) -> np.ndarray:
    """Numbers of more than 8 bits as bytes, by one scale for all images: one that is dark stays so.

    Integers are those of 16 bits, floats go from 0 to 1.
    """
    most = 1.0 if x.dtype.kind == "f" else 65535.0
    if not (x.min() >= 0 and x.max() <= most):  # nor NaN
        raise ValueError(f"its numbers go from {x.min():g} to {x.max():g}; expected 8 bits, "
                         "integers from 0 to 65535, or floats from 0 to 1")  # fmt: skip
    return (x.astype(np.float64) / most * 255).round().astype(np.uint8)


def names(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Label and word of each class, as a problem has them.

    Example:
      >>> names(["cat", "dog"])
      [('0', 'cat'), ('1', 'dog')]
    """
    return [(str(i), "" if name == str(i) else name) for i, name in enumerate(classes)]
