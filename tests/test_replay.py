"""Shipping: base and ledger in, the same bits out, in blocks and in other processes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.flax import load_file, save_file

import hiso_jax as hj
from hiso_jax import models
from hiso_jax._engine import trees
from hiso_jax._engine.tensorfile import TensorFile
from hiso_jax.ledger import replay
from hiso_jax.train import finetune
from tests.helpers import (
    REVIEWS,
    assert_same_bits,
    finish,
    here,
    odd_loss,
    odd_tree,
    refuse,
    start,
)


def make() -> tuple[hj.Algorithm, Any]:
    whole = odd_tree()["first"]
    # Empty, scalar, shorter and longer than a block, sizes that 32 does not divide.
    tree = {f"leaf{n}": whole[f"leaf{n}"].astype(jnp.bfloat16) for n in (0, 1, 3, 6, 8, 9)}
    params = tree | {"step": jnp.int32(3), "frozen": jnp.ones(77)}
    mask = jax.tree.map(lambda x: True, params) | {"frozen": False}
    schedule = optax.linear_schedule(1e-2, 0, 20)
    alg = hj.federated_hiso(
        odd_loss, schedule, local_steps=2, distribution="rademacher", trainable=mask
    )
    return alg, params


def fill(path: Any, alg: hj.Algorithm, params: Any, rounds: int = 10) -> tuple[hj.Ledger, hj.State]:
    state = alg.init(params, jax.random.key(3))
    ledger, advance = hj.Ledger.create(path, alg, state), jax.jit(alg.advance)
    for round in range(rounds):
        scalars = np.random.default_rng(round).normal(size=ledger.shape).astype(np.float32)
        record = np.full_like(scalars, np.nan) if round == 4 else scalars
        rate = alg.learning_rate(state.round)
        state = advance(state, record, rate)
        ledger.append(record, hj.digest(state), rate)
    return ledger, state


def test_parts_of_something_else_are_refused():
    alg, params = make()
    by_parts = replay.Replay(hj.Ledger.create(":memory:", alg, alg.init(params, jax.random.key(3))))
    with pytest.raises(ValueError, match="x: expected a flat part of 'frozen' in float32"):
        by_parts.advance("frozen", 0, np.zeros(3))
    with pytest.raises(ValueError, match="name: expected one of"):
        by_parts.advance("nobody", 0, np.zeros(3, np.float32))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: Any) -> dict[str, Any]:
    """A ledger, its compact file and the base on disk."""
    folder = tmp_path_factory.mktemp("shipped")
    alg, params = make()
    ledger, end = fill(folder / "ledger.sqlite", alg, params)
    with ledger:
        ledger.export(folder / "ledger.safetensors")
    save_file(trees.named(params), folder / "base.safetensors")
    return dict(folder=folder, params=params, end=end)


@pytest.mark.parametrize("ledger, processes", [
    ("ledger.sqlite", False), ("ledger.safetensors", False),
    pytest.param("ledger.sqlite", True, marks=(pytest.mark.slow, pytest.mark.ci)),
])  # fmt: skip
def test_a_job_proves_the_same_bits(
    shipped: dict[str, Any], ledger: str, processes: bool, tmp_path: Path
):
    folder, out = shipped["folder"], tmp_path / "out.safetensors"
    arguments = (str(folder / ledger), str(folder / "base.safetensors"), str(out))
    said = finish(start("replay", *arguments)) if processes else here("replay", *arguments)
    assert "equal to the ledger's, bit for bit" in said
    assert_same_bits(load_file(out), trees.named(shipped["end"].params))
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]
    assert "exists; nothing is written over" in refuse("replay", *arguments)


def test_a_wrong_base_is_refused_and_nothing_is_written(shipped: dict[str, Any], tmp_path: Path):
    folder = shipped["folder"]
    wrong = trees.named(shipped["params"])
    first = next(iter(n for n, x in wrong.items() if x.size > 1000))
    flipped = wrong | {first: wrong[first].at[(0,) * wrong[first].ndim].add(1)}
    lacking = {n: x for n, x in wrong.items() if n != first}
    save_file(flipped, tmp_path / "flipped.safetensors")
    save_file(lacking, tmp_path / "lacking.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 100)
    cases = {"flipped": "another base model", "lacking": "another base model",
             "garbage": "not a safetensors file", "absent": "no such file or folder"}  # fmt: skip
    for name, message in cases.items():
        output = refuse("replay", str(folder / "ledger.sqlite"),
                        str(tmp_path / f"{name}.safetensors"), str(tmp_path / "out" / name))  # fmt: skip
        assert message in output and "exit 1" in output
    sent = str(folder / "ledger.safetensors")  # read into memory, but named as it was given
    output = refuse(
        "replay", sent, str(tmp_path / "flipped.safetensors"), str(tmp_path / "out/sent")
    )
    assert f"{sent}: it belongs to another base model" in output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_on_a_hugging_face_folder_is_shipped(tiny: Path, tmp_path: Path):
    """A job of three rounds; then base and 1 kB make the same weights again."""
    reviews, run = tmp_path / "reviews.csv", tmp_path / "run"
    lines = ["review,mood", *(f"{row['review']},{row['mood']}" for row in REVIEWS)]
    reviews.write_text("\n".join(lines))
    here("finetune", "--model", str(tiny), "--data", str(reviews), "--text", "review", "--label",
         "mood", "--clients", "4", "--clients-per-round", "3", "--rounds", "3",
         "--learning-rate", "3e-3", "--out", str(run))  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 3 and summary["shipped_bytes"] < 3 * 24 + 4096
    check_shipping(run, tiny, summary["digest"], tmp_path)


@pytest.mark.slow
def test_the_main_job_is_shipped(tmp_path: Path):
    """The same with 22.6 million parameters, in a process."""
    try:
        base = finetune.bundled_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    finish(start("finetune", "--rounds", "3", "--out", str(run)))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 3 and summary["parameters"] == 22_567_680
    assert 0.5 < summary["accuracy_before"] < 0.7
    # 8 clients x 20 bytes x 3 rounds over all clients: less than ten bytes each on average
    assert summary["uplink_bytes_per_client"] == 3 * 8 * 20 / summary["clients"]
    files = {p.name for p in (run / "model").iterdir()}
    assert files >= {"model.safetensors", "config.json", "labels.safetensors", "tokenizer.json"}
    assert summary["shipped_bytes"] < 3 * 24 + 4096
    check_shipping(run, base, summary["digest"], tmp_path)


def check_shipping(run: Path, base: Path, digest: str, folder: Path) -> None:
    """The run's weights from its ledger and the base, in however many files that comes."""
    # As a large model comes, in several files.
    sharded, out = folder / "base", folder / "out"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    weight_map = {}
    for number in (0, 1):
        part = dict(sorted(tensors.items())[number::2])
        save_file(part, sharded / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    said = here("replay", str(run / "ledger.sqlite"), str(sharded), str(out))
    assert f"digest {digest}: equal to the ledger's" in said
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    both = [load_file(out / f"model-{number}.safetensors") for number in (0, 1)]
    assert_same_bits(both[0] | both[1], load_file(run / "model" / "model.safetensors"))
    assert_same_bits(*(models.from_pretrained(f).params for f in (out, run / "model")))
    # One part only, which an index names; and a file of its own beside an index of others.
    for name, named in (("model-1-of-1.safetensors", "model-1-of-1.safetensors"),
                        ("model.safetensors", "gone.safetensors")):  # fmt: skip
        lone, made = folder / f"base of {name}", folder / f"made of {name}"
        lone.mkdir()
        (lone / "config.json").write_bytes((base / "config.json").read_bytes())
        save_file(tensors, lone / name)
        index = {"weight_map": dict.fromkeys(tensors, named)}
        (lone / "model.safetensors.index.json").write_text(json.dumps(index))
        here("replay", str(run / "ledger.sqlite"), str(lone), str(made))
        assert (made / "model.safetensors.index.json").exists() == (name == named)
        assert_same_bits(*(models.from_pretrained(f).params for f in (made, run / "model")))


def test_tensor_files_are_those_of_the_library(tmp_path: Path):
    tree = {"a": jnp.arange(7, dtype=jnp.bfloat16), "b": jnp.ones((2, 3)), "c": jnp.zeros((0, 4)),
            "d": jnp.array([True, False])}  # fmt: skip
    save_file(tree, tmp_path / "theirs", metadata={"format": "pt"})
    with TensorFile(tmp_path / "theirs") as file:
        with TensorFile.create(tmp_path / "ours", file.tensors, file.metadata) as copy:
            for name, tensor in file.tensors.items():
                for place in range(0, tensor.size, 2):
                    count = min(2, tensor.size - place)
                    copy.write(name, place, file.read(name, place, count))
    assert_same_bits(load_file(tmp_path / "ours"), tree)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    (tmp_path / "cut").write_bytes((tmp_path / "ours").read_bytes()[:-3])
    with TensorFile(tmp_path / "cut") as file, pytest.raises(ValueError, match="truncated inside"):
        for name, tensor in file.tensors.items():
            file.read(name, 0, tensor.size)
