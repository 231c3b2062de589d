"""Folders of small images, as the tests read them."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def pictures(count: int, size: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Gray noise with a bright bar, where the label says."""
    labels = np.arange(count) % 10
    x = RNG.integers(0, 60, (count, size, size))
    for row, label in zip(x, labels, strict=True):
        row[:, 2 * label : 2 * label + 4] += 190
    return x.astype(np.uint8), labels.astype(np.uint8)


def write_idx(path: Path, x: np.ndarray) -> None:
    head = struct.pack(">4B", 0, 0, 8, x.ndim) + struct.pack(f">{x.ndim}I", *x.shape)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(head + x.tobytes())


def idx_files(folder: Path) -> Path:
    """The four files of MNIST with 240 and 40 such images."""
    for stem, count, end in (("train", 240, ".gz"), ("t10k", 40, "")):
        for kind, x in zip(("images-idx3", "labels-idx1"), pictures(count), strict=True):
            write_idx(folder / f"{stem}-{kind}-ubyte{end}", x)
    return folder


def colored(label: int, size: tuple[int, int] = (20, 14)) -> Image.Image:
    x = RNG.integers(0, 80, (size[1], size[0], 3))
    x[..., label] += 170
    return Image.fromarray(x.astype(np.uint8))


def class_folders(root: Path) -> Path:
    """Two classes as people leave them: other modes, other kinds, what systems put beside them."""
    for label, name in enumerate(("apples", "pears")):
        (root / name / "more").mkdir(parents=True)
        for i in range(30):
            colored(label).save(root / name / f"{i}.{('png', 'JPG', 'bmp')[i % 3]}",
                                ("PNG", "JPEG", "BMP")[i % 3])  # fmt: skip
        colored(label).save(root / name / "more" / "deeper.png")
        (root / name / ".DS_Store").write_bytes(b"\0")
        (root / name / "._0.png").write_bytes(b"\0\5\x16\7")
        (root / name / "notes.txt").write_text("mine")
    (root / ".cache").mkdir()
    return root
