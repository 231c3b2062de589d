"""Files of images: what is read, and what is refused in one line."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hiso_jax.tasks import images
from tests.helpers import assert_same_bits
from tests.pictures import RNG, class_folders, colored, idx_files, write_idx


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures"))


def test_idx_files(idx: Path, tmp_path: Path):
    found = images.read(idx)
    assert {n: p["image"].shape for n, p in found.parts.items()} == {
        "train": (204, 28, 28, 1), "dev": (36, 28, 28, 1), "test": (40, 28, 28, 1)}  # fmt: skip
    assert found.classes == tuple("0123456789")
    held = np.concatenate([found.parts[n]["image"] for n in ("train", "dev")])
    whole = images.read_idx(idx / "train-images-idx3-ubyte.gz")[..., None]
    key = lambda x: sorted(row.tobytes() for row in x)  # noqa: E731
    assert key(held) == key(whole)  # each once
    path = tmp_path / "x-idx1-ubyte"
    for content, text in (
        (b"\0\0\x08\x01\0\0\0\x03ab", r"expected \(3,\) bytes, got 2"),
        (b"\0\0\x0d\x01\0\0\0\x01a", "unsigned bytes, got 00000d01"),
        (b"\0\0\x08\x03\0\0", "cut off within its sizes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text):
            images.read_idx(path)
    with pytest.raises(ValueError, match="--data: .* lacks train-images"):
        images.read(tmp_path)
    for name in idx.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    path.unlink()
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(40, 10, np.uint8))
    with pytest.raises(ValueError, match="labels from 0 to 9 .* up to 10"):
        images.read(tmp_path)


def test_cifar_in_both_forms(tmp_path: Path):
    x, y = RNG.integers(0, 256, (6, 20, 3072), np.uint8), RNG.integers(0, 10, (6, 20), np.uint8)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    (tmp_path / "binary").mkdir()
    (tmp_path / "python").mkdir()
    for name, flat, label in zip(names, x, y, strict=True):
        (tmp_path / "binary" / f"{name}.bin").write_bytes(np.c_[label, flat].tobytes())
        content = {b"data": flat, b"labels": label.tolist(), b"batch_label": b"some"}
        (tmp_path / "python" / name).write_bytes(pickle.dumps(content, 2))
    one, two = images.read(tmp_path / "binary"), images.read(tmp_path / "python")
    assert_same_bits(one.parts, two.parts)
    assert one.classes[3] == "cat" and one.parts["train"]["image"].shape == (85, 32, 32, 3)
    np.testing.assert_array_equal(  # color by color in the file
        one.parts["test"]["image"], x[5].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # fmt: skip

    path = tmp_path / "python" / "data_batch_2"
    for content, text in (
        (pickle.dumps(print, 2), "print has no place in CIFAR-10"),
        (pickle.dumps({b"data": x[0], b"labels": [11] * 20}, 2), "whole numbers from 0 to 9"),
        (pickle.dumps({b"data": x[0][:, :9], b"labels": [1] * 20}, 2), r"uint8 \(20, 9\)"),
        (path.read_bytes()[:200], "not a file of CIFAR-10"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"data_batch_2: not a file of CIFAR-10.*{text}|{text}"
        ):
            images.read(tmp_path / "python")
    path.unlink()
    with pytest.raises(ValueError, match="lacks data_batch_2 of CIFAR-10"):
        images.read(tmp_path / "python")


def test_a_folder_of_images_per_class(folder: Path):
    found = images.read(folder, 12)
    assert found.classes == ("apples", "pears")
    assert sum(len(p["label"]) for p in found.parts.values()) == 62
    for part in found.parts.values():
        assert part["image"].shape[1:] == (12, 12, 3) and part["image"].dtype == np.uint8
        bright = part["image"].astype(float).mean((1, 2)).argmax(-1)
        np.testing.assert_array_equal(bright, part["label"])
    assert found.notes == (f"{folder.name}: files that are no images were not read: 2 .txt",)


def test_splits_of_their_own(tmp_path: Path):
    for part, count in (("Training", 10), ("val", 4)):
        for label, name in enumerate(("10", "2")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                colored(label).save(tmp_path / part / name / f"{i}.png")
    found = images.read(tmp_path, 8)
    assert found.classes == ("2", "10")  # as people sort numbers
    assert {n: len(p["label"]) for n, p in found.parts.items()} == {
        "train": 17, "dev": 8, "test": 3}  # fmt: skip
    (tmp_path / "val" / "plums").mkdir()
    colored(2).save(tmp_path / "val" / "plums" / "0.png")
    with pytest.raises(ValueError, match="val: plums is no class of train, which has 2, 10"):
        images.read(tmp_path, 8)


def tree(root: Path, folders: str, count: int = 9) -> Path:
    """Images in each of some folders."""
    for label, name in enumerate(folders.split()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            colored(label % 3).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize("folders, parts, note", [
    ("train/cat train/dog Eval/cat Eval/dog", {"train", "dev", "test"}, ""),
    ("train/cat train/dog evaluation/cat evaluation/dog testing/dog", {"train", "dev", "test"}, ""),
    ("train/cat train/dog test/cat test/dog unlabeled", {"train", "dev", "test"}, "unlabeled"),
])  # fmt: skip
def test_splits_are_found_by_all_their_names(
    folders: str, parts: set[str], note: str, tmp_path: Path
):
    found = images.read(tree(tmp_path, folders), 8)
    assert found.classes == ("cat", "dog") and found.parts.keys() == parts
    assert [
        n.endswith(f"folders that are no split were not read: {note}") for n in found.notes
    ] == ([True] if note else [])


def test_folders_whose_names_unicode_writes_in_two_ways(tmp_path: Path):
    """As systems do that write accents apart; and names that are no text at all."""
    found = images.read(tree(tmp_path, "train/caf\u00e9 train/dog dev/cafe\u0301 dev/dog"), 8)
    assert found.classes == ("caf\u00e9", "dog")
    (tmp_path / "train" / "\udcc4pfel").mkdir()
    with pytest.raises(
        ValueError, match=r"train: the name of a folder: .*not UTF-8, in '.udcc4pfel"
    ):
        images.read(tmp_path, 8)


def test_split_or_class(tmp_path: Path):
    """What is called as a split and holds images is a class; two of one split are refused."""
    found = images.read(tree(tmp_path / "a", "bus car train"), 8)
    assert found.classes == ("bus", "car", "train")
    with pytest.raises(ValueError, match="val and validation are both of dev"):
        images.read(tree(tmp_path / "b", "train/x train/y val/x validation/x"), 8)
    with pytest.raises(ValueError, match="expected a folder train .* beside test"):
        images.read(tree(tmp_path / "c", "x y test/x test/y"), 8)


def test_one_scale_for_all_images_of_more_than_8_bits(tmp_path: Path):
    """A dark one stays dark, whatever is in it."""
    for value, wanted in ((0, 0), (255, 1), (256, 1), (300, 1), (65535, 255)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / "a.png")
        assert (images.picture(tmp_path / "a.png", 4) == wanted).all()
    for value, wanted in ((0.0, 0), (0.2, 51), (1.0, 255)):
        Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tiff")
        assert (images.picture(tmp_path / "a.tiff", 4) == wanted).all()
    for wrong in (np.full((4, 4), 7, np.float32), np.full((4, 4), np.nan, np.float32),
                  np.full((4, 4), -1, np.int32), np.full((4, 4), 70_000, np.int32)):  # fmt: skip
        Image.fromarray(wrong).save(tmp_path / "a.tiff")
        with pytest.raises(ValueError, match="expected 8 bits, integers from 0 to 65535, or float"):
            images.picture(tmp_path / "a.tiff", 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path):
    gray = np.linspace(0, 255, 256).reshape(16, 16)
    if mode == "I;16":
        image = Image.fromarray((gray * 257).astype(np.uint16))
    elif mode in "IF":
        whole = mode == "I"
        image = Image.fromarray((gray * 257).astype(np.int32) if whole else np.float32(gray / 255))
    else:
        image = Image.fromarray(gray.astype(np.uint8)).convert(mode)
    path = tmp_path / f"some.{'tiff' if mode in ('CMYK', 'I', 'F') else 'png'}"
    image.save(path)
    got = images.picture(path, 16).astype(float)
    assert got.shape == (16, 16, 3)
    if mode == "1":  # of dots
        gray = np.asarray(image, float) * 255
    assert np.abs(got - gray[..., None]).max() < 5


def test_what_is_transparent_is_white_and_turned_as_the_camera_says(tmp_path: Path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (images.picture(tmp_path / "clear.png", 8) == 255).all()
    x = np.zeros((8, 8, 3), np.uint8)
    x[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(x).save(tmp_path / "turned.png", exif=exif)
    got = images.picture(tmp_path / "turned.png", 8)
    assert (got[:4] == 0).all() and (got[4:] == 255).all()


def test_folders_that_are_none_are_refused(folder: Path, tmp_path: Path):
    def refused(text: str, kind: Any = ValueError) -> None:
        with pytest.raises(kind, match=text) as caught:
            images.read(tmp_path / "d", 8)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500

    refused("expected a folder of images, there is none", FileNotFoundError)
    (tmp_path / "d").mkdir()
    refused("two classes or more, each with images; found none")
    (tmp_path / "d" / "one").mkdir()
    refused("no image in one, only files with the suffixes .png")
    colored(0).save(tmp_path / "d" / "one" / "a.png")
    refused("found only 'one'")
    (tmp_path / "d" / "two").mkdir()
    colored(0).save(tmp_path / "d" / "two" / "a.png")
    refused("2 images are too few")
    for i in range(9):
        colored(0).save(tmp_path / "d" / "one" / f"{i}.png")
    cut = (tmp_path / "d" / "one" / "0.png").read_bytes()
    (tmp_path / "d" / "two" / "cut.png").write_bytes(cut[: len(cut) // 2])
    refused("1 image cannot be read, take it out or fetch it again: .*cut.png")
    (tmp_path / "d" / "two" / "text.jpg").write_text("not an image")
    (tmp_path / "d" / "two" / "empty.gif").write_bytes(b"")
    refused(
        "3 images cannot be read, take them out.*cut.png: .*empty.gif: not an image; .*text.jpg"
    )
    colored(0).save(tmp_path / "d" / "loose.png")
    refused("a folder for each class, found images beside them: loose.png")
