"""First-order baselines: as their papers write them, and as jobs that resume."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hiso_jax.federation import baselines
from hiso_jax.train import methods
from tests.helpers import here, refuse


def loss(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch) ** 2).sum() + params["w"][0] ** 4


def gradient(w: np.ndarray, batch: np.ndarray) -> np.ndarray:
    return np.array(jax.grad(loss)({"w": jnp.asarray(w)}, jnp.asarray(batch))["w"])


def rounds(alg: baselines.Baseline, data: list[np.ndarray], weights: Any = None) -> np.ndarray:
    state, step = alg.init({"w": jnp.arange(3.0)}, jax.random.key(0)), jax.jit(alg.round)
    for batches in data:
        state, metrics = step(state, jnp.asarray(batches), weights)
        assert metrics.finite.all()
    return np.asarray(state.params["w"])


DATA = list(np.random.default_rng(0).normal(size=(4, 3, 2, 3)).astype(np.float32))  # R, C, K, d


def test_fedavg_is_the_mean_of_local_sgd():
    """Algorithm 1 of arXiv 1602.05629, with clients of unlike weight."""
    x, weights = np.arange(3.0), np.array([1.0, 2.0, 0.0])
    for batches in DATA:
        ends = []
        for own in batches:
            w = x.copy()
            for batch in own:
                w = w - 0.05 * gradient(w, batch)
            ends.append(w)
        x = np.average(ends, axis=0, weights=weights)
    alg = baselines.first_order("fedavg", loss, 0.05, local_steps=2)
    np.testing.assert_allclose(rounds(alg, DATA, weights), x, rtol=1e-5)


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_adaptive_servers(name: str):
    """Algorithm 2 of arXiv 2003.00295, with optax's correction of Adam's and Yogi's start."""
    tau, b1, b2, rate = 1e-3, 0.9, 0.99, 0.1
    x, m, v = np.arange(3.0), np.zeros(3), np.full(3, {"fedyogi": 1e-6}.get(name, 0.0))
    v = np.full(3, tau**2) if name == "fedadagrad" else v
    for t, batches in enumerate(DATA, 1):
        ends = []
        for own in batches:
            w = x.copy()
            for batch in own:
                w = w - 0.01 * gradient(w, batch)
            ends.append((x - w) / 0.02)
        g = np.mean(ends, axis=0)
        if name == "fedadagrad":
            v = v + g**2
            x = x - rate * g / (np.sqrt(v) + tau)
            continue
        m = b1 * m + (1 - b1) * g
        if name == "fedadam":
            v = b2 * v + (1 - b2) * g**2
        else:
            v = v - (1 - b2) * g**2 * np.sign(v - g**2)
        x = x - rate * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + tau)
    alg = baselines.first_order(name, loss, rate, local_steps=2)
    np.testing.assert_allclose(rounds(alg, DATA), x, rtol=2e-3, atol=2e-3)


def test_fedzo_goes_down_with_directions_of_each_client_s_own():
    alg = baselines.fedzo(loss, 0.02, local_steps=2, num_perturbations=10)
    before = float(np.mean([loss({"w": jnp.arange(3.0)}, b) for r in DATA for c in r for b in c]))
    end = {"w": jnp.asarray(rounds(alg, DATA * 20))}
    assert methods.forward_passes(alg) == 2 * 11
    after = float(np.mean([loss(end, b) for r in DATA for c in r for b in c]))
    assert after < before / 2
    same = np.broadcast_to(DATA[0][:1], DATA[0].shape)  # clients with the same data differ
    state = alg.init({"w": jnp.arange(3.0)}, jax.random.key(0))
    alone, _ = jax.jit(alg.round)(state, jnp.asarray(same[:1]))
    three, _ = jax.jit(alg.round)(state, jnp.asarray(same))
    assert not np.allclose(alone.params["w"], three.params["w"])


def test_a_nan_moves_nothing_and_frozen_leaves_stay():
    mask = {"w": True, "frozen": False}
    alg = baselines.first_order("fedadam", loss, 0.1, trainable=mask)
    state = alg.init({"w": jnp.arange(3.0), "frozen": jnp.ones(2)}, jax.random.key(0))
    batches = jnp.asarray(DATA[0][:, :1]).at[1].set(jnp.nan)
    end, metrics = jax.jit(alg.round)(state, batches)
    assert metrics.finite.tolist() == [True, False, True] and np.isnan(metrics.record).all()
    np.testing.assert_array_equal(end.params["w"], state.params["w"])
    end, _ = jax.jit(alg.round)(state, jnp.asarray(DATA[0][:, :1]))
    np.testing.assert_array_equal(end.params["frozen"], 1)
    assert (np.asarray(end.params["w"]) != np.arange(3.0)).all()


def test_who_is_absent_is_never_averaged_in_and_the_last_gradient_is_looked_at():
    alg = baselines.first_order("fedavg", loss, 0.1)
    state, batches = alg.init({"w": jnp.zeros(3)}, jax.random.key(0)), jnp.asarray(DATA[0][:, :1])
    step, here = jax.jit(alg.round), jnp.array([1.0, 0.0, 1.0])
    alone, _ = step(state, batches, here)
    end, _ = step(state, batches.at[1].set(jnp.nan), here)
    np.testing.assert_array_equal(end.params["w"], alone.params["w"])
    steep = lambda params, batch: jnp.sqrt(params["w"]).sum() + 0 * batch.sum()  # noqa: E731
    alg = baselines.first_order("fedavg", steep, 0.1)  # finite at zero, its slope is not
    end, metrics = jax.jit(alg.round)(state, batches)
    assert metrics.finite.all() and np.isnan(metrics.record).all()
    np.testing.assert_array_equal(end.params["w"], 0)


def test_a_schedule_is_of_the_round():
    rate = optax.piecewise_constant_schedule(0.1, {1: 0.0})
    for name in ("fedavg", "fedadam"):
        alg = baselines.first_order(name, loss, rate, local_steps=2)
        np.testing.assert_array_equal(rounds(alg, DATA), rounds(alg, DATA[:1]))


def test_methods_are_checked_and_yours_is_found():
    assert methods.check("hiso_jax:decomfl") == "hiso_jax:decomfl"
    assert methods.title("hiso_jax:decomfl") == "decomfl"
    for wrong in ("hizo", "nowhere:at_all", "hiso_jax:nothing"):
        with pytest.raises(ValueError, match="--method: expected one of hiso, .*of yours"):
            methods.check(wrong)


@pytest.mark.slow
@pytest.mark.ci
def test_a_job_with_a_baseline_resumes_to_the_same_weights(tmp_path: Path):
    """Cut off after its last snapshot, as a kill would leave it."""
    options = ("--method", "fedadam", "--learning-rate", "0.02", "--rounds", "30",
               "--eval-every", "10", "--snapshot-every", "10", "--dropout", "0.2")  # fmt: skip
    cut = tmp_path / "cut"

    def summary() -> dict[str, Any]:
        found = json.loads((cut / "summary.json").read_text())
        return {k: v for k, v in found.items() if "seconds" not in k}

    assert "FedAdam" in here("digits", *options, "--out", str(cut))
    whole = summary()
    (cut / "snapshots" / "round-00000030.safetensors").unlink()
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(lines[:26]) + '{"broken')
    before = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").unlink()
    here("digits", "--resume", str(cut))
    assert (cut / "model.safetensors").read_bytes() == before
    assert summary() == whole
    assert whole["uplink_bytes_per_client"] > 4610 * 4


def test_a_method_without_a_tuned_rate_asks_for_one(tmp_path: Path):
    out = ("--out", str(tmp_path / "run"))
    said = refuse("digits", "--method", "fzoo", *out)
    assert "--learning-rate: none was tuned" in said and "exit 1" in said
    assert "expected one of hiso" in refuse("digits", "--method", "fzo", *out)
    assert not (tmp_path / "run").exists()
