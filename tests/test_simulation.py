"""Clients, traffic and the round loop."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import Clients, Traffic
from tests.helpers import assert_same_bits

DATA = {f"c{i}": {"x": np.arange(100 * i, 100 * i + 3 + i, dtype=np.float32)} for i in range(6)}


def test_batches_come_from_their_clients_and_small_ones_are_padded():
    clients = Clients(DATA)
    names = ["c5", "c0"]
    batch = clients.batches(names, round=3, batch_size=4, local_steps=2, seed=1)
    assert batch["x"].shape == batch["weight"].shape == (2, 2, 4)
    for name, x, weight in zip(names, batch["x"], batch["weight"], strict=True):
        for k in range(2):
            real = x[k][weight[k] > 0]
            assert len(set(real)) == min(len(DATA[name]["x"]), 4)
            assert set(real) <= set(DATA[name]["x"])


def test_everything_is_a_function_of_seed_and_round():
    one, two = Clients(DATA), Clients(DATA)
    assert one.sample(3, 5, seed=1) == two.sample(3, 5, seed=1)
    assert len({tuple(one.sample(3, r)) for r in range(20)}) > 10
    a = one.batches(["c1", "c2"], 5, 3, seed=1)
    b = two.batches(["c2"], 5, 3, seed=1)  # whoever else takes part does not matter
    assert_same_bits(a["x"][1], b["x"][0])


def test_every_client_takes_part():
    clients = Clients(DATA)
    assert {n for r in range(60) for n in clients.sample(2, r)} == set(DATA)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_clients_in_turns_take_part_equally_often(count: int, more: int, seed: int):
    """Within a turn nobody is drawn twice; over any rounds nobody answers for more than that."""
    names = [f"{i}" for i in range(count + more)]
    per, rounds = len(names) // count, 17
    draws = [federation.draw(names, count, r, seed, balanced=True) for r in range(rounds)]
    assert all(len(set(drawn)) == count for drawn in draws)
    for start in range(0, rounds, per):
        turn = [name for drawn in draws[start : start + per] for name in drawn]
        assert len(set(turn)) == len(turn)
    most = max(Counter(name for drawn in draws for name in drawn).values())
    assert most <= -(-rounds // per)


def test_sampling_by_size():
    """Clients take part in proportion to their examples, within five standard errors."""
    data = {f"c{i}": {"x": np.zeros(1 + 9 * (i == 0))} for i in range(31)}
    draws = [Clients(data).sample(1, r, sampling="size")[0] for r in range(400)]
    assert abs(draws.count("c0") / 400 - 10 / 40) < 5 * np.sqrt(0.25 * 0.75 / 400)
    with pytest.raises(ValueError, match="sampling: .*'loud'"):
        Clients(data).sample(1, 0, sampling="loud")


@pytest.mark.parametrize("data, text", [
    ({}, "at least one client"), ({"a": {"x": np.zeros(0)}}, "'a' needs columns"),
    ({"a": {"x": np.zeros(2), "y": np.zeros(3)}}, "'a' needs columns of one length"),
    ({"a": {"x": np.zeros(2)}, "b": {"y": np.zeros(2)}}, "'b' must have the same columns"),
    ({"a": {"weight": np.zeros(2)}}, 'called "weight"'),
])  # fmt: skip
def test_bad_data(data: dict, text: str):
    with pytest.raises(ValueError, match=text):
        Clients(data)


def test_too_many_clients_asked():
    with pytest.raises(ValueError, match="count: expected 1 to 6 clients a round, got 7"):
        Clients(DATA).sample(7, 0)


def test_traffic_adds_up():
    traffic = Traffic((1, 5))
    traffic.ask(["a", "b"], 0)
    traffic.ask(["b"], 1)
    traffic.ask(["a"], 4)
    assert traffic.up == {"a": 40, "b": 40}  # twice 5 float32 each
    assert traffic.down == {"a": 8 + 4 + 4 + 4 * 20, "b": 8 + 4 + 4 + 20}
    traffic.catch_up(["a", "b", "c"], 5)
    assert [traffic.down[n] for n in "abc"] == [8 + 8 + 100, 8 + 8 + 100, 8 + 100]


def loss_fn(params: dict, batch: dict) -> jax.Array:
    return (((params["w"] - batch["x"]) ** 2) * batch["weight"]).sum() / batch["weight"].sum()


def test_a_run_can_be_stopped_and_gone_on_with():
    alg, clients = hj.federated_hiso(loss_fn, 1e-4), Clients(DATA)
    options = dict(clients_per_round=2, batch_size=3, seed=4)
    start = lambda: alg.init({"w": jnp.zeros(())}, jax.random.key(0))  # noqa: E731
    whole = list(federation.run(alg, start(), clients, rounds=6, **options))
    half = list(federation.run(alg, start(), clients, rounds=3, **options))
    rest = list(federation.run(alg, half[-1].state, clients, rounds=6, **options))
    assert [r.round for r in half + rest] == [r.round for r in whole] == [1, 2, 3, 4, 5, 6]
    assert_same_bits(rest[-1].state, whole[-1].state)


def test_a_nan_names_the_client_and_loses_nothing():
    data = DATA | {"bad": {"x": np.full(3, np.nan, np.float32)}}
    alg, clients = hj.decomfl(loss_fn, 1e-4), Clients(data)
    state = alg.init({"w": jnp.ones(())}, jax.random.key(0))
    seen = []
    with pytest.raises(FloatingPointError, match=r"clients \['bad'\] sent scalars that are NaN"):
        for report in federation.run(
            alg, state, clients, rounds=50, clients_per_round=2, batch_size=2
        ):
            seen.append(float(report.state.params["w"]))
    assert np.isfinite(seen).all() and seen[-1] == (seen[-2] if len(seen) > 1 else 1.0)


@pytest.mark.parametrize("estimator, place", [("forward", "at"), ("central", "near")])
def test_a_loss_that_is_nan_before_any_step_is_not_the_learning_rates_fault(
    estimator: str, place: str
):
    """Nor is one that only the perturbed parameters give the fault of the data."""
    data = {n: {"x": np.full(3, v, np.float32)} for n, v in dict(a=np.nan, b=1, c=np.inf).items()}
    options: dict[str, Any] = dict(rounds=1, clients_per_round=3, batch_size=2)
    for broken, kind, told in [
        (("a",), "NaN", loss_fn),
        (("a", "c"), "NaN or infinite", loss_fn),
        ((), "", lambda p, b: jnp.where(p["w"] == 1, loss_fn(p, b), jnp.nan)),
    ]:
        alg = hj.decomfl(told, 1e-4, estimator=estimator, num_perturbations=2)
        own = {n: x if n in broken else data["b"] for n, x in data.items()}
        state = alg.init({"w": jnp.ones(())}, jax.random.key(0))
        with pytest.raises(FloatingPointError) as caught:
            list(federation.run(alg, state, Clients(own), **options))
        assert "sent scalars that are NaN, infinite or beyond 1e+12" in str(caught.value)
        if broken:
            assert f"{kind} {place} the model's own parameters" in str(caught.value)
            assert "look at their data and at the model" in str(caught.value)
            assert all(name in str(caught.value).split("the loss of")[1] for name in broken)
        elif estimator == "forward":
            assert "Lower the learning rate" in str(caught.value)


def test_evaluate_counts_every_example_once():
    sums = federation.evaluate(
        lambda params, batch: {"sum": (batch["x"] * batch["weight"]).sum(), "n": batch["weight"].sum()},
        None, {"x": np.arange(10.0)}, batch_size=4,
    )  # fmt: skip
    assert sums == {"sum": 45.0, "n": 10.0}


def test_clients_that_drop_out_count_for_nothing_and_empty_rounds_move_nothing():
    alg, clients = hj.federated_hiso(loss_fn, optax.linear_schedule(1e-2, 0, 30)), Clients(DATA)
    state, seen = alg.init({"w": jnp.ones(())}, jax.random.key(0)), {"empty": 0, "part": 0}
    before, digest = state.params["w"], hj.digest(state)
    for report in federation.run(
        alg, jax.tree.map(jnp.copy, state), clients, rounds=30, clients_per_round=3, batch_size=2,
        dropout=0.6,
    ):  # fmt: skip
        after, new = float(report.state.params["w"]), hj.digest(report.state)
        present = report.weights > 0
        assert report.reported == {
            n: 1.0 for n, here in zip(report.names, present, strict=True) if here
        }
        if not present.any():
            seen["empty"] += 1
            assert np.isnan(report.metrics.record).all() and not report.bad
            assert after == before and (new == digest).all()
        else:
            seen["part"] += not present.all()
            mean = np.asarray(report.metrics.scalars)[present].mean(0)
            np.testing.assert_allclose(report.metrics.record, mean, rtol=1e-5)
            assert (new != digest).any()
        before, digest = after, new
    assert seen["empty"] >= 2 and seen["part"] >= 10
    with pytest.raises(ValueError, match="dropout: expected"):
        next(federation.run(alg, state, clients, rounds=1, clients_per_round=1, batch_size=1,
                            dropout=1.5))  # fmt: skip


@pytest.mark.parametrize("rate", [0.01, optax.linear_schedule(0.1, 0, 9)])
def test_downlink_is_what_the_ledger_sends(rate: Any):
    """A client's catch-up is accounted with the very bytes of ``ledger.records(since)``."""
    alg = hj.decomfl(loss_fn, rate, num_perturbations=3)
    state = alg.init({"w": jnp.ones(())}, jax.random.key(0))
    traffic = Traffic((1, 3), schedule=callable(rate))
    with hj.Ledger.create(":memory:", alg, state) as ledger:
        for round in range(6):
            ledger.append(np.full((1, 3), round), hj.digest(state), alg.learning_rate(round))
        traffic.ask(["a"], 2, reported=[])
        assert traffic.up == {}  # asked, and never heard of again
        sent = traffic.down["a"]
        traffic.catch_up(["a"], 6)
        assert traffic.down["a"] - sent == ledger.records(since=2).nbytes


def test_joined_clients_are_the_same_clients():
    rng = np.random.default_rng(0)
    data = {f"c{i}": {"x": rng.normal(size=(i + 1, 2)), "y": np.arange(i + 1)} for i in range(5)}
    one = Clients(data)
    columns = {k: np.concatenate([own[k] for own in data.values()]) for k in ("x", "y")}
    two = Clients.joined(list(data), [1, 2, 3, 4, 5], columns)
    assert one.names == two.names and one.sizes == two.sizes == {f"c{i}": i + 1 for i in range(5)}
    for clients in (one, two):
        np.testing.assert_array_equal(clients["c3"]["x"], data["c3"]["x"])
        names = clients.sample(3, round=4, sampling="size")
        batch = clients.batches(names, round=4, batch_size=3, local_steps=2)
        for c, name in enumerate(names):
            own = {tuple(row) for row in data[name]["x"]}
            assert {tuple(r) for r in batch["x"][c].reshape(-1, 2)} <= own
            kept = min(3, len(own))
            assert batch["weight"][c].sum(-1).tolist() == [kept, kept]
    with pytest.raises(ValueError, match="sizes: .*2 names, 1 sizes"):
        Clients.joined(["a", "b"], [1], {"x": np.zeros(1)})
