"""The benchmarks measure what they say, on something small."""

import importlib.util
import json
from typing import Any, get_args

import numpy as np
import pytest

from benchmarks import noise, peers, scaling
from benchmarks import round as one
from hiso_jax import directions

SMALL: dict[str, Any] = dict(shape="opt-1m", batch=2, length=8, num_perturbations=2, repeats=1)


def test_round(capsys: pytest.CaptureFixture[str]):
    one.main(one.Options(**SMALL, local_steps=2, json=True))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    parameters = 2048 * 128 + 2050 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128
    assert found["parameters"] == parameters
    assert found["scalars_per_client"] == 4 and found["bytes_per_client"] == 16
    assert found["rule_memory"] == 1 and found["temp_memory"] > 1  # local steps: a copy
    assert found["overhead"] == pytest.approx(found["round_seconds"] / found["bare_seconds"])
    assert found["peak_rss_bytes"] > 4 * parameters and found["compile_seconds"] > 0


def test_floor_counts_operations():
    options = one.Options(shape="opt-125m")
    # 2 operations for every weight of the layers and token, and attention's two products.
    weights, tokens = 12 * 12 * 768**2, 2 * 32 * 32
    assert one.flops(options) == 6 * tokens * (2 * weights + 12 * 2 * 2 * 32 * 768)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.slow  # the benchmark itself compares them
@pytest.mark.parametrize(
    "steps,law,more",
    [
        (1, "normal", {}),
        (2, "rademacher", {}),
        (1, "normal", dict(method="decomfl", dtype="bfloat16")),
    ],
)
def test_peer_computes_the_same_loss_and_moves(steps: int, law: Any, more: Any):
    options = peers.Options(**SMALL, local_steps=steps, distribution=law, **more)
    found = peers.measure(options)  # raises if the losses differ
    assert found["times_faster_than_sequential"] > 0
    assert ("shared" in found["seconds"]) == (steps == 1)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["hiso", "decomfl"])
def test_settings_of_the_peer_find_the_same_scalars(method: Any):
    import torch

    options = peers.Options(**SMALL, method=method)
    data = one.batches(options)
    records = []
    for shared, together in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        loop = peers.Loop(peers.torch_model(options), options, data, shared, together)
        records.append([loop(), loop()])
    for other in records[1:]:
        for a, b in zip(records[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0.05, atol=2e-3)


def test_every_noise_has_a_price():
    found = noise.measure(noise.Options(numbers=2**10, times=2, repeats=1))
    assert tuple(found) == get_args(directions.Distribution) and min(found.values()) > 0


def test_a_million_clients_take_little():
    found = scaling.million(clients=10_000, sampled=100, rounds=1)
    assert found["milliseconds"] > 0 and found["megabytes"] < 100
