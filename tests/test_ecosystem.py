"""What people bring: data sets of others, schedules of optax, parameters of flax, equinox or none."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import Clients, baselines
from hiso_jax.tasks import splits

X = np.arange(24, dtype=np.float32).reshape(12, 2)
Y = np.arange(12) % 3
WARD = ["a", "b", "a", "c"] * 3


def of_datasets() -> Any:
    import datasets

    table = {"x": X.tolist(), "y": Y.tolist(), "ward": WARD}
    return datasets.Dataset.from_dict(table)


class Pairs:
    """A map-style data set, as torchvision's: pairs of an image and a label."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return X[i], int(Y[i])


def same(one: Clients, other: Clients) -> bool:
    return one.sizes == other.sizes and all(
        (one[n]["x"] == other[n]["x"]).all() and (one[n]["y"] == other[n]["y"]).all()
        for n in one.names
    )


def test_every_kind_of_data_set_gives_the_same_clients():
    own = {name: np.flatnonzero(np.array(WARD) == name) for name in "abc"}
    expected = Clients({name: {"x": X[i], "y": Y[i]} for name, i in own.items()})
    columns = {"x": X, "y": Y, "ward": WARD}
    rows = [dict(x=x, y=y, ward=w) for x, y, w in zip(X, Y, WARD, strict=True)]
    for found in (of_datasets(), columns, rows):
        assert same(Clients.from_dataset(found, "ward"), expected)
        kept = Clients.from_dataset(found, own, columns=("x", "y"))
        assert same(kept, expected)
    assert same(Clients.from_dataset(Pairs(), own), expected)
    assert same(Clients.from_dataset(list(zip(X, Y, strict=True)), own), expected)


@pytest.mark.parametrize("partition", [
    lambda: splits.iid(12, 4), lambda: splits.dirichlet(Y, 4, 0.5), lambda: splits.by_size(12, 4),
])  # fmt: skip
def test_every_split_is_a_partition(partition: Callable[[], Any]):
    """Every row goes to one client, with its own label."""
    clients = Clients.from_dataset(of_datasets(), partition(), columns=("x", "y"))
    assert clients.names == ["0", "1", "2", "3"] and sum(clients.sizes.values()) == 12
    assert sorted(clients.columns["x"][:, 0].tolist()) == X[:, 0].tolist()
    assert (clients.columns["y"] == (clients.columns["x"][:, 0] // 2).astype(int) % 3).all()


def test_a_column_of_numbers_names_clients_as_a_job_does():
    found = Clients.from_dataset({"x": X[:4], "ward": [1, 1.0, "1", 2]}, "ward")
    assert (
        found.sizes
        == {"1": 3, "2": 1}
        == {k: len(v) for k, v in splits.natural([1, 1.0, "1", 2]).items()}
    )


@pytest.mark.parametrize("data, partition, columns, message", [
    ({"x": X, "ward": WARD}, "wards", None, r"partition: expected one of the columns \['x', 'ward'\]"),
    ({"x": X, "t": ["film"] * 12}, [range(12)], None, "column 't' is no array of numbers.*tokenize"),
    ({"x": X, "t": [[1], [1, 2]] * 6}, [range(12)], None, "rows of column 't' have several shapes"),
    ({"x": X, "ward": [None, *WARD[1:]]}, "ward", None, "partition: example 0 has none"),
    ({"x": X, "y": Y[:3]}, [range(3)], None, "columns of one length"),
    ({"x": X}, [range(12)], ("y",), r"columns: \['y'\] are not there"),
    ({"x": X}, [[0, 1], [1, 2]], None, "a row is of two clients"),
    ({"x": X}, [[0, 12]], None, "expected numbers from 0 to 11, got 0 to 12"),
    ({"x": X}, [[0.5]], None, "client 0: expected numbers of rows"),
    ({"x": X}, {"a": []}, None, "client 'a': expected numbers of rows, at least one"),
    ({"x": X}, [], None, "at least one client, got none"),
    ([], [range(1)], None, "at least one row, got none"),
    ([(1, 2), (1, 2, 3)], [range(2)], None, "tuples of one length"),
    ([{"x": 1}, {"y": 1}], [range(2)], None, "row 1 has"),
    (7, [range(2)], None, "expected a datasets.Dataset"),
    ({"weight": X}, [range(12)], None, "weight"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(data: Any, partition: Any, columns: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Clients.from_dataset(data, partition, columns)


def test_a_dict_of_data_sets_is_told_from_one():
    import datasets

    with pytest.raises(ValueError, match=r"expected one split, got \['train'\]"):
        Clients.from_dataset(datasets.DatasetDict(train=of_datasets()), "ward")


# Parameters ---------------------------------------------------------------------------------------


def dense() -> tuple[Any, Any]:
    """A dict of arrays, and a loss of it."""
    params = {"kernel": jnp.ones((2, 1)) / 4, "bias": jnp.zeros(())}
    return params, lambda p, x: x @ p["kernel"] + p["bias"]


def linen() -> tuple[Any, Any]:
    import flax.linen as nn

    model = nn.Dense(1)
    return model.init(jax.random.key(0), jnp.ones((1, 2))), model.apply


def nnx_state() -> tuple[Any, Any]:
    from flax import nnx

    graph, state = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    return state, lambda state, x: nnx.merge(graph, state)(x)


def equinox() -> tuple[Any, Any]:
    import equinox as eqx

    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("make", [dense, linen, nnx_state, equinox])
def test_parameters_of_every_kind_are_trained(make: Callable[[], tuple[Any, Any]], tmp_path: Any):
    """A round moves them; their structure stays; the ledger rebuilds them, and optax moves them."""
    if make is equinox:
        pytest.importorskip("equinox")
    params, apply = make()

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return ((apply(params, batch["x"])[:, 0] - batch["x"][:, 0]) ** 2).mean()

    x = jax.random.normal(jax.random.key(1), (4, 1, 8, 2))
    alg = hj.federated_hiso(loss_fn, optax.linear_schedule(0.05, 0.0, 40), num_perturbations=4)
    start = state = alg.init(params, jax.random.key(0))
    step, first = jax.jit(alg.round), loss_fn(params, {"x": x[0, 0]})
    with hj.Ledger.create(tmp_path / "run.sqlite", alg, start) as ledger:
        for _ in range(20):
            state, metrics = step(state, {"x": x})
            ledger.append(metrics.record, hj.digest(state), metrics.learning_rate)
        again = hj.server.catch_up(alg, start, ledger.records())
    assert loss_fn(state.params, {"x": x[0, 0]}) < 0.5 * first
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert (hj.digest(again) == hj.digest(state)).all()
    tx = hj.hiso(optax.constant_schedule(0.01))
    updates, _ = tx.update(
        None, tx.init(params), params, value_fn=lambda p: loss_fn(p, {"x": x[0, 0]})
    )
    moved = optax.apply_updates(params, updates)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
    )


# Schedules ----------------------------------------------------------------------------------------


def test_a_schedule_is_compiled_once_for_all_rounds():
    """A server asks for the rate of every round, outside of any program."""
    seen = []

    def schedule(round: Any) -> Any:
        seen.append(round)
        return 0.1 / (1 + round)

    rate = hj.decomfl(quadratic, schedule).learning_rate
    rates, traced = [float(rate(jnp.int32(0)))], len(seen)
    rates += [float(rate(jnp.int32(round))) for round in range(1, 4)]
    assert rates == pytest.approx([0.1 / (1 + round) for round in range(4)])
    assert len(seen) == traced


@pytest.mark.parametrize("build", [
    lambda rate: hj.decomfl(quadratic, rate),
    lambda rate: baselines.first_order("fedavg", quadratic, rate),
    lambda rate: baselines.first_order("fedadam", quadratic, rate),
    lambda rate: baselines.first_order("fedadam", quadratic, 0.1, client_learning_rate=rate, local_steps=2),
    lambda rate: baselines.fedzo(quadratic, rate),
], ids=["decomfl", "fedavg", "fedadam", "fedadam's clients", "fedzo"])  # fmt: skip
def test_a_schedule_is_taken_wherever_a_rate_is(build: Callable[[Any], Any]):
    """A constant one changes nothing; one that changes from round 1 on does so from there."""
    later = lambda round: jnp.where(round < 1, 0.1, 0.02)  # noqa: E731
    runs = [two_rounds(build(rate)) for rate in (0.1, optax.constant_schedule(0.1), later)]
    assert runs[0] == runs[1]
    assert runs[0][0] == runs[2][0] and runs[0][1] != runs[2][1]


def quadratic(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch) ** 2).sum()


def two_rounds(alg: Any) -> list[float]:
    steps = alg.config["local_steps"] if isinstance(alg, baselines.Baseline) else 1
    state, out = alg.init({"w": jnp.zeros(3)}, jax.random.key(0)), []
    step = jax.jit(alg.round)
    for _ in range(2):
        state, _ = step(state, jnp.ones((2, steps, 3)))
        out.append(float(state.params["w"].sum()))
    return out


def test_clients_of_a_data_set_take_part():
    clients = Clients.from_dataset(of_datasets(), "ward")

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return (batch["weight"] * (batch["x"] @ params["w"] - batch["y"]) ** 2).mean()

    alg = hj.decomfl(loss_fn, 1e-3)
    state = alg.init({"w": jnp.zeros(2)}, jax.random.key(0))
    reports = federation.run(alg, state, clients, rounds=2, clients_per_round=2, batch_size=4)
    assert [report.round for report in reports] == [1, 2]
