"""The job of images, from data to replayed weights; files: `test_image_files`."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from hiso_jax import models
from hiso_jax._engine import trees
from hiso_jax.ledger import rebuild
from hiso_jax.models import efficientnet, vision
from hiso_jax.tasks import image_problem
from hiso_jax.train import compare, job
from hiso_jax.train import images as images_job
from tests.helpers import assert_same_bits, here, refuse
from tests.pictures import RNG, class_folders, idx_files, pictures


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idx_files(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("pictures"))


OPTIONS = ("--clients", "4", "--clients-per-round", "2", "--batch-size", "4", "--rounds", "4",
           "--num-perturbations", "3", "--eval-every", "2", "--learning-rate", "1e-2",
           "--snapshot-every", "3")  # fmt: skip


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig

    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=3,
                       intermediate_size=24, image_size=16, patch_size=8)  # fmt: skip
    out = tmp_path_factory.mktemp("vit")
    models.save_pretrained(models.from_config(config, jax.random.key(0)), out)
    (out / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3]}))  # fmt: skip
    return out


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("train, trained", [
    pytest.param("all", None, marks=pytest.mark.slow),
    ("head", 16 * 2 + 2),
    pytest.param("last-2", 16 * 16 * 4 + 16 * 24 * 2 + 9 * 16 + 24 + 34, marks=pytest.mark.slow),
    ("lora", 3 * 2 * 2 * 16 * 2 + 34),
])  # fmt: skip
def test_a_vit_is_trained_and_replayed(
    train: str, trained: int | None, folder: Path, small_vit: Path, tmp_path: Path
):
    out = tmp_path / "run"
    own = ("--lora-rank", "2") if train == "lora" else ()
    here("images", *OPTIONS, "--data", str(folder), "--model", str(small_vit), "--train", train,
         *own, "--out", str(out))  # fmt: skip
    assert (out / "report.html").exists() and (out / "split.png").exists()
    if trained is not None:
        assert summary(out)["trained_parameters"] == trained
    made = rebuild.rebuild(out / "ledger.sqlite", small_vit, tmp_path / "made")
    assert made.proved and made.digest == summary(out)["digest"]
    assert "the classifier of 2 classes" in made.note
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "made", out / "model"))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)
    start = load_file(small_vit / "model.safetensors")
    moved = {n for n, x in theirs.items() if n not in start or not np.array_equal(x, start[n])}
    layers = {n.split(".")[3] for n in moved if "layer." in n}
    assert layers == {"all": {"0", "1", "2"}, "head": set(), "last-2": {"2"}}.get(
        train, {"0", "1", "2"})  # fmt: skip
    again = vision.load(str(out / "model"))  # its own classes: no new classifier
    assert again.classes == ("apples", "pears") and again.mean == (0.1, 0.2, 0.3)
    found = image_problem.trained(again, "all", again.classes)
    assert found.adapter is None and "classifier" in found.model.params


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_that_is_stopped_goes_on(
    folder: Path, small_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = (*OPTIONS, "--data", str(folder), "--model", str(small_vit), "--train", "head")
    here("images", *options, "--out", str(tmp_path / "whole"))
    real = job.rounds

    def two(*arguments: Any) -> Any:
        for step in real(*arguments):
            if step.round == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(job, "rounds", two)
    here("images", *options, "--out", str(tmp_path / "cut"), code=130)
    monkeypatch.setattr(job, "rounds", real)
    assert not (tmp_path / "cut" / "summary.json").exists()
    here("images", "--resume", str(tmp_path / "cut"))
    kept = [{k: v for k, v in summary(tmp_path / name).items() if "seconds" not in k}
            for name in ("whole", "cut")]  # fmt: skip
    assert kept[0] == kept[1]
    other = Image.open(folder / "apples" / "0.png").point(lambda x: 255 - x)
    moved = tmp_path / "other"
    for path in folder.rglob("*.*"):
        if path.is_file():
            (moved / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (moved / path.relative_to(folder)).write_bytes(path.read_bytes())
    other.save(moved / "apples" / "0.png")  # one image of 62
    said = refuse("images", "--resume", str(tmp_path / "cut"), "--data", str(moved))
    assert "not what the run began with" in said and "exit 1" in said


def random_lite0() -> vision.Vision:
    """With norms that keep what goes through it in size."""
    leaves = {}
    for name, shape in efficientnet.shapes(3).items():
        x = RNG.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        if len(shape) == 1:
            x = 0.1 * x + name.endswith(("weight", "running_var"))
        leaves[name] = x.astype(np.float32)
    return vision.of_lite0(efficientnet.nested(leaves), ("a", "b", "c"))


@pytest.mark.slow
def test_a_new_classifier_on_efficientnet(idx: Path, tmp_path: Path):
    base, start = tmp_path / "base", random_lite0()
    start.save(base, start.params, start.classes)
    options = ("--data", str(idx), "--model", str(base), "--train", "head", "--size", "16")
    for method in ("rms", "fedadam"):
        here("images", *OPTIONS, *options, "--method", method, "--out", str(tmp_path / method))
        found = summary(tmp_path / method)
        assert found["trained_parameters"] == 12_810
        assert np.isclose(found["loss_before"], np.log(10), rtol=1e-5)  # equal chances
        assert found["digest"] and found["loss"] != found["loss_before"]
    rebuild.rebuild(tmp_path / "rms" / "ledger.sqlite", base, tmp_path / "made")
    ours, theirs = (efficientnet.load(tmp_path / p / "model.safetensors") for p in
                    ("made", "rms/model"))  # fmt: skip
    assert_same_bits(ours, theirs)
    again = vision.load(str(tmp_path / "made"))
    assert again.classes == tuple("0123456789")
    for name, x in trees.named(start.params).items():
        if not name.startswith("_fc"):
            np.testing.assert_array_equal(trees.named(ours)[name], x)


def test_of_efficientnet_only_weights_are_trained():
    """The moments of batch norm are numbers of the checkpoint."""
    model = random_lite0()
    convolutions = 1 + 1 + sum(3 if b.expand > 1 else 2 for b in efficientnet.BLOCKS)
    for train, leaves in (
        ("all", 3 * convolutions + 2), ("head", 2), ("last-2", 3 + 2), ("last-3", 9 + 3 + 2),
        ("norms", 2 * convolutions + 2), ("biases", convolutions + 2),
    ):  # fmt: skip
        found = image_problem.trained(model, train, ("x", "y"))
        names = trees.select(found.model.params, found.mask)
        assert len(names) == leaves and not [n for n in names if "running" in n]
        assert {"classifier/kernel", "classifier/bias"} <= names.keys()
        assert found.frozen == {"head": 18, "last-2": 17, "last-3": 16}.get(train, 0)
    kept = image_problem.trained(model, "all", ("a", "b", "c"))  # its own classes
    assert kept.adapter is None
    assert len(trees.select(kept.model.params, kept.mask)) == 3 * convolutions + 2
    with pytest.raises(ValueError, match="--train lora: targets: expected some of"):
        image_problem.trained(model, "lora", ("x", "y"))


@pytest.mark.parametrize("train", ["head", "last-2"])
def test_frozen_stages_are_what_whole_passes_are(train: str, small_vit: Path):
    x, y = pictures(5, 20)
    columns = {"image": x[..., None], "label": (y % 2).astype(np.int32)}
    parts = {"train": columns, "dev": columns, "test": columns}
    found = image_problem.trained(vision.load(str(small_vit)), train, ("x", "y"))
    make = lambda found: image_problem.problem(  # noqa: E731
        "some", found, parts, [np.arange(2), np.arange(2, 5)], [("0", ""), ("1", "")]
    )
    frozen, whole = make(found), make(found._replace(frozen=0))
    assert frozen.dev["stream"].shape == ((5, 16) if train == "head" else (5, 5, 16))
    moved = trees.merge(frozen.params, {
        n: np.asarray(x) + RNG.normal(size=x.shape).astype(np.float32)
        for n, x in trees.select(frozen.params, frozen.trainable).items()})  # fmt: skip
    weight = {"weight": np.ones(5, np.float32)}
    losses = [float(jax.jit(p.loss_fn)(moved, p.dev | weight)) for p in (frozen, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert abs(losses[0] - np.log(2)) > 1e-2


def test_upper_directions_with_a_new_classifier(small_vit: Path):
    x, y = pictures(5, 20)
    columns = {"image": x[..., None], "label": (y % 2).astype(np.int32)}
    found = image_problem.trained(vision.load(str(small_vit)), "all", ("x", "y"))
    parts = {"train": columns, "dev": columns, "test": columns}
    own = image_problem.problem("some", found, parts, [np.arange(5)], [("0", ""), ("1", "")])
    assert own.upper is not None
    batch = columns | {"weight": np.ones(5, np.float32)}
    deep, cut = own.upper(3), own.upper(2, 3)
    assert cut.leaves["classifier/kernel"] == 0 and "model/vit/layernorm/bias" in cut.leaves
    assert cut.leaves["model/vit/encoder/layer/output/dense/kernel"] == 2
    leaves = trees.named(own.params)
    moved = trees.merge(own.params, {
        n: leaves[n] + (np.arange(len(leaves[n])) >= row).reshape(-1, *[1] * (leaves[n].ndim - 1))
        * RNG.normal(size=leaves[n].shape).astype(np.float32) for n, row in cut.leaves.items()})  # fmt: skip
    assert cut.between is not None
    kept = jax.jit(cut.between)(own.params, jax.jit(deep.trunk)(own.params, batch))
    wanted = jax.jit(own.loss_fn)(moved, batch)
    np.testing.assert_allclose(jax.jit(cut.head)(moved, kept), wanted, rtol=1e-4)
    assert abs(float(wanted) - np.log(2)) > 1e-2
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="--upper-layers: expected 1 to 3"):
            own.upper(wrong)


def test_options_that_do_not_fit_are_refused(idx: Path, small_vit: Path, tmp_path: Path):
    data = ("--data", str(idx), "--learning-rate", "1e-3")
    for arguments, text in (
        (("--train", "top"), "--train: expected all, head, norms, biases, lora or last-N, got 'top'"),
        (("--train", "head"), "--train: the small network has nothing pretrained"),
        (("--size", "4"), "--size: expected at least 8"),
        (("--alpha", "0"), "--alpha"),
        (("--model", str(tmp_path)), "expected a folder with config.json"),
        (("--model", str(small_vit), "--size", "32"), "takes images of 16 pixels, got 32"),
        (("--model", str(small_vit), "--train", "last-9"), "--train: expected last-1 to last-4"),
        (("--model", str(small_vit), "--train", "lora", "--lora-targets", "q_proj"),
         "--train lora: targets: expected some of"),
        (("--method", "sgd"), "--method"),
    ):  # fmt: skip
        said = refuse("images", *data, *arguments, "--out", str(tmp_path / "run"))
        assert text in said and "exit 1" in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_the_small_network_learns(idx: Path):
    options = images_job.Options(data=idx, clients=4, clients_per_round=4, rounds=60, eval_every=60,
                                 num_perturbations=8, learning_rate=0.1, method="rms")  # fmt: skip
    row = compare.one("images", options)
    assert row["test"] > 0.3 and row["passes_per_round"] == 9  # chance is 0.1
