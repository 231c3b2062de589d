"""Different programs, the same bits: what replay, catch-up and shipping rest on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax as hj
from tests.helpers import assert_same_bits, bits, odd_loss, odd_tree

ROUNDS = 50


def make(local_steps: int = 1, **options: Any) -> hj.Algorithm:
    schedule = optax.cosine_decay_schedule(1e-2, ROUNDS + 10)
    return hj.federated_hiso(
        odd_loss,
        schedule,
        local_steps=local_steps,
        num_perturbations=5,
        update_steps="all",
        **options,
    )


def batches(round: int, clients: int, steps: int, width: int = 3) -> jax.Array:
    rng = np.random.default_rng(round)
    return jnp.asarray(rng.normal(size=(clients, steps, width)), jnp.float32)


CASES = [
    pytest.param(("normal", 1), id="normal-K1", marks=pytest.mark.slow),
    pytest.param(("rademacher", 3), id="rademacher-K3"),
    pytest.param(("near_normal", 2), id="near_normal-K2", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=CASES)
def run(request: Any) -> dict[str, Any]:
    """Fifty fused rounds with a changing number of clients, and their records."""
    distribution, steps = request.param
    alg = make(steps, distribution=distribution)
    start = alg.init(odd_tree(), jax.random.key(1))
    assert sum(x.size for x in jax.tree.leaves(start.params)) > 250_000
    fused, state, records = jax.jit(alg.round), start, []
    for round in range(ROUNDS):
        # Two batch shapes, so two different programs, take turns.
        clients, width = ((4, 3), (3, 5))[round % 2]
        state, metrics = fused(state, batches(round, clients, steps, width))
        records.append(metrics.record)
        if round == 9:
            tenth = state
    assert bits(state.params) != bits(start.params)
    return dict(alg=alg, start=start, tenth=tenth, end=state, records=jnp.stack(records))


def test_advance_alone(run: dict[str, Any]):
    state, advance = run["start"], jax.jit(run["alg"].advance)
    for record in run["records"]:
        state = advance(state, record)
    assert_same_bits(run["end"], state)


def test_scanned_history(run: dict[str, Any]):
    assert_same_bits(run["end"], jax.jit(run["alg"].replay)(run["start"], run["records"]))


def test_without_jit(run: dict[str, Any]):
    state = plain = run["start"]
    for record in run["records"][:2]:
        state = jax.jit(run["alg"].advance)(state, record)
        plain = run["alg"].advance(plain, record)
    assert_same_bits(state, plain)


def test_leaf_by_leaf(run: dict[str, Any]):
    """A subtree replayed alone reaches the bits it reaches in company."""
    alg, params, replay = run["alg"], odd_tree(), jax.jit(run["alg"].replay)
    for name in list(params["first"])[::3]:
        alone = alg.init({"first": {name: params["first"][name]}}, jax.random.key(1))
        end = replay(alone, run["records"])
        assert_same_bits(run["end"].params["first"][name], end.params["first"][name])
        curvature = f"first/{name}"
        assert_same_bits(run["end"].rule.curvature[curvature], end.rule.curvature[curvature])


def test_sharded_over_eight_devices(run: dict[str, Any]):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def place(x: jax.Array) -> jax.Array:
        split = x.ndim > 0 and x.shape[0] % 8 == 0
        return jax.device_put(
            x, jax.sharding.NamedSharding(mesh, spec("model") if split else spec())
        )

    # Some leaves, which do not depend on the others (above), and ten rounds: these are eight
    # devices on two cores.
    first, names = odd_tree()["first"], ("leaf0", "leaf9", "leaf11", "leaf13", "leaf15")
    some = {"first": {n: place(first[n]) for n in names}}
    end = jax.jit(run["alg"].replay)(run["alg"].init(some, jax.random.key(1)), run["records"][:10])
    assert len(end.params["first"]["leaf11"].sharding.device_set) == 8
    assert not end.params["first"]["leaf11"].sharding.is_fully_replicated
    for n in names:
        assert_same_bits(run["tenth"].params["first"][n], end.params["first"][n])
        curvature = f"first/{n}"
        assert_same_bits(run["tenth"].rule.curvature[curvature], end.rule.curvature[curvature])


def test_bfloat16_parameters():
    """Stochastic rounding comes from the shared key: replay is exact there too."""
    leaves = odd_tree()["first"]
    params = {n: leaves[n].astype(jnp.bfloat16) for n in ("leaf0", "leaf3", "leaf11", "leaf12")}
    loss_fn = lambda p, b: odd_loss(jax.tree.map(lambda x: x.astype(jnp.float32), p), b)  # noqa: E731
    alg = hj.federated_hiso(loss_fn, 1e-3, local_steps=2, distribution="rademacher")
    start = state = alg.init(params, jax.random.key(1))
    fused, records = jax.jit(alg.round), []
    for round in range(10):
        state, metrics = fused(state, batches(round, 2, 2))
        records.append(metrics.record)
    assert state.params["leaf11"].dtype == jnp.bfloat16
    assert bits(state.params) != bits(start.params)
    assert_same_bits(state, jax.jit(alg.replay)(start, jnp.stack(records)))


def test_freezing_a_leaf_changes_no_other():
    """The others' noise, and so their path, is that of the unfrozen run with the same records."""
    params = odd_tree()
    params["first"] = {n: params["first"][n] for n in ("leaf4", "leaf8", "leaf12")}
    frozen = lambda p: jax.tree.map(lambda x: True, p) | {"second": [False, True]}  # noqa: E731
    records = jnp.asarray(np.random.default_rng(0).normal(size=(5, 1, 5)), jnp.float32)
    ends = []
    for mask in (None, frozen):
        alg = make(distribution="rademacher", trainable=mask)
        ends.append(jax.jit(alg.replay)(alg.init(params, jax.random.key(1)), records))
    assert_same_bits(ends[0].params["first"], ends[1].params["first"])
    assert_same_bits(ends[0].params["second"][1], ends[1].params["second"][1])
    assert_same_bits(ends[1].params["second"][0], params["second"][0])
    assert "second/0" not in ends[1].rule.curvature


def test_decay_one_is_decomfl():
    records = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3, 5)), jnp.float32)
    hiso = hj.federated_hiso(odd_loss, 1e-2, local_steps=3, decay=1.0)
    decomfl = hj.decomfl(odd_loss, 1e-2, local_steps=3)
    first, small = odd_tree().values()
    some = {name: first[name] for name in list(first)[::4]}
    ends = [jax.jit(a.replay)(a.init(some, jax.random.key(0)), records) for a in (hiso, decomfl)]
    assert_same_bits(ends[0].params, ends[1].params)
    one = batches(0, 2, 3)
    probes = [jax.jit(a.probe)(a.init(small, jax.random.key(0)), one) for a in (hiso, decomfl)]
    np.testing.assert_allclose(probes[0], probes[1], rtol=1e-3, atol=1e-3)
