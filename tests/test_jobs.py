"""The jobs as real processes: what they leave behind, and how they end."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hiso_jax.train import digits
from tests.helpers import assert_same_bits, finish, here, refuse, start

SUMMARY = {"method", "rounds", "accuracy_before", "accuracy", "uplink_bytes_per_client",
           "downlink_bytes_per_client", "seconds_per_round", "compile_seconds"}  # fmt: skip


def test_digits_leaves_its_folder(tmp_path: Path):
    """That the same options give the same bits again is tested with runs that are killed."""
    options = ("--rounds", "60", "--eval-every", "20", "--seed", "3")
    output = finish(start("digits", *options, "--out", str(tmp_path)))
    assert "test accuracy after" in output and "FedAvg would have moved" in output
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "curve.png", "labels.json", "ledger.safetensors", "ledger.sqlite", "metrics.jsonl",
        "model.safetensors", "options.json", "snapshots", "split.png", "summary.json"}  # fmt: skip
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    # 60 rounds x 8 of 40 clients x 10 float32
    assert summary["uplink_bytes_per_client"] == 60 * 8 * 40 / 40
    # the key, the number of a round when asked, and 60 records with their learning rates
    assert summary["downlink_bytes_per_client"] == 8 + 60 * 8 * 4 / 40 + 60 * (40 + 4)
    assert summary["payload_bytes"] == 60 * (40 + 4)
    shipped = (tmp_path / "ledger.safetensors").stat().st_size
    assert 0 < shipped - 60 * (40 + 4) < 4096 and summary["shipped_bytes"] == shipped
    assert summary["accuracy"] > summary["accuracy_before"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows] == list(range(61))


def test_the_digits_and_first_weights_are_those_of_the_libraries():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    np.testing.assert_array_equal(digits.table(), np.c_[theirs.data, theirs.target])
    for shape in ((3, 3, 1, 16), (96, 10)):
        inits = (digits.lecun_normal, nnx.initializers.lecun_normal())
        assert_same_bits(*(init(jax.random.key(1), shape) for init in inits))


@pytest.mark.slow
def test_compare_draws_both(tmp_path: Path):
    output = finish(start("digits", "--compare", "--rounds", "20", "--out", str(tmp_path)))
    assert "HiSo" in output and "DeComFL" in output
    both = json.loads((tmp_path / "summary.json").read_text())
    assert [s["method"] for s in both] == ["hiso", "decomfl"]
    first = [json.loads((tmp_path / m / "metrics.jsonl").read_text().splitlines()[5])
             for m in ("hiso", "decomfl")]  # fmt: skip
    assert first[0]["clients"] == first[1]["clients"]  # the same seeds


def test_divergence_is_said(tmp_path: Path):
    """And seen by scripts: the exit code is 1, and the JSON has no word that is not JSON."""
    options = ("--learning-rate", "1e6", "--rounds", "50", "--out", str(tmp_path))
    output = here("digits", *options, code=1)
    assert "sent NaN or infinite" in output and "of 50 rounds: NaN" in output
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["rounds"] < 50 and summary["accuracy"] is None and summary["stopped"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("job, option", [
    ("finetune", "--rounds"), ("digits", "--per-client-directions"), ("mnist", "--alpha"),
    ("compare", "--vary"), ("results", "--where"), ("robustness", "--shares"),
    ("curvature", "--decay"),
])  # fmt: skip
def test_help(job: str, option: str):
    output = refuse(job, "--help")
    assert option in output and "exit 0" in output
