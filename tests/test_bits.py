"""Some or all of the leaves, sharded or not, in a program or none: the same bits.

Round, advance, replay and digest against one another: `test_programs`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hiso_jax as hj
from tests.helpers import assert_same_bits, bits, odd_loss, odd_tree, replay_in_blocks

ROUNDS = 6


def make(**options: Any) -> hj.Algorithm:
    schedule = optax.cosine_decay_schedule(1e-2, 60)
    return hj.federated_hiso(odd_loss, schedule, num_perturbations=5, update_steps="all", **options)


def batches(round: int, clients: int, steps: int, width: int = 3) -> jax.Array:
    rng = np.random.default_rng(round)
    return jnp.asarray(rng.normal(size=(clients, steps, width)), jnp.float32)


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """Fused rounds on all of the odd tree."""
    return long_run("rademacher", 3, ROUNDS)


def long_run(law: str, steps: int, rounds: int, changing: bool = False) -> dict[str, Any]:
    """Fused rounds, maybe with two shapes of batches that take turns; their records."""
    alg = make(local_steps=steps, distribution=law)
    start = alg.init(odd_tree(), jax.random.key(1))
    assert sum(x.size for x in jax.tree.leaves(start.params)) > 250_000
    fused, state = jax.jit(alg.round), start
    ledger = hj.Ledger.create(":memory:", alg, start)
    for round in range(rounds):
        clients, width = ((2, 3), (3, 5))[round % 2 * changing]
        state, metrics = fused(state, batches(round, clients, steps, width))
        ledger.append(metrics.record, hj.digest(state), metrics.learning_rate)
    assert bits(state.params) != bits(start.params)
    records = jnp.asarray(ledger.records().scalars)
    return dict(alg=alg, start=start, end=state, records=records, ledger=ledger)


@pytest.mark.slow
@pytest.mark.parametrize("law, steps", [("normal", 1), ("rademacher", 3), ("near_normal", 2)])
def test_fifty_rounds(law: str, steps: int):
    """The rows of `test_programs`, on a larger tree and for longer."""
    run = long_run(law, steps, 50, changing=True)
    state, advance = run["start"], jax.jit(run["alg"].advance)
    for record in run["records"]:
        state = advance(state, record)
    assert_same_bits(run["end"], state)
    assert_same_bits(run["end"], jax.jit(run["alg"].replay)(run["start"], run["records"]))


@pytest.mark.slow
@pytest.mark.ci
def test_replay_of_whole_leaves(run: dict[str, Any]):
    """In the blocks of a large leaf; `test_programs` has those of small ones."""
    assert_same_bits(run["end"].params, replay_in_blocks(run["ledger"], odd_tree()))


def test_without_jit(run: dict[str, Any]):
    alg, first = run["alg"], odd_tree()["first"]
    some = {"first": {n: first[n] for n in ("leaf0", "leaf4", "leaf11")}}  # a pack, and a block
    state = plain = alg.init(some, jax.random.key(1))
    for record in run["records"][:2]:
        state = jax.jit(alg.advance)(state, record)
        plain = alg.advance(plain, record)
    assert_same_bits(state, plain)


def test_leaf_by_leaf(run: dict[str, Any]):
    """A subtree replayed alone reaches the bits it reaches in company, of a pack or of many leaves."""
    alg, params, replay = run["alg"], odd_tree(), jax.jit(run["alg"].replay)
    for name in ("leaf9", "leaf11"):
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

    # Some leaves, which do not depend on the others (above): these are eight devices on two cores.
    first, names = odd_tree()["first"], ("leaf0", "leaf9", "leaf11", "leaf13", "leaf15")
    some = {"first": {n: place(first[n]) for n in names}}
    end = jax.jit(run["alg"].replay)(run["alg"].init(some, jax.random.key(1)), run["records"])
    assert len(end.params["first"]["leaf11"].sharding.device_set) == 8
    assert not end.params["first"]["leaf11"].sharding.is_fully_replicated
    for n in names:
        assert_same_bits(run["end"].params["first"][n], end.params["first"][n])
        curvature = f"first/{n}"
        assert_same_bits(run["end"].rule.curvature[curvature], end.rule.curvature[curvature])


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
    records = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2, 5)), jnp.float32)
    hiso = hj.federated_hiso(odd_loss, 1e-2, local_steps=2, decay=1.0)
    decomfl = hj.decomfl(odd_loss, 1e-2, local_steps=2)
    first, small = odd_tree().values()
    some = {name: first[name] for name in ("leaf4", "leaf8")}
    ends = [jax.jit(a.replay)(a.init(some, jax.random.key(0)), records) for a in (hiso, decomfl)]
    assert_same_bits(ends[0].params, ends[1].params)
    one = batches(0, 2, 2)
    probes = [jax.jit(a.probe)(a.init(small, jax.random.key(0)), one) for a in (hiso, decomfl)]
    np.testing.assert_allclose(probes[0], probes[1], rtol=1e-3, atol=1e-3)
