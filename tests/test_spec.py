"""An algorithm as data: choices that know nothing of each other, and back from a ledger's header."""

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import aggregators, estimators, rules
from hiso_jax.algorithm import algorithm
from hiso_jax.ledger import replay
from tests.helpers import PROBLEMS, assert_same_bits, quadratic_loss, replay_in_blocks

PARAMS = PROBLEMS["quadratic"].params | {"frozen": jnp.ones(3)}
MASK = {"w": True, "frozen": False}
KEY = jax.random.key(0)


def keep_all(params: Any, batch: Any) -> Any:
    return batch


UPPER = hj.Split(keep_all, quadratic_loss, {"w": 8}, directions=1)
OPTIONS: list[dict[str, Any]] = [
    dict(rule=rules.hiso()), dict(rule=rules.rms(), per_client_directions=2, local_steps=2),
    dict(rule=rules.identity(), seed_pool=16, distribution="near_normal"),
    dict(rule=rules.hizoo(), estimator="three_point"), dict(rule=rules.adam(), upper=UPPER),
    dict(rule=rules.momentum(), upper=[UPPER, UPPER._replace(leaves={"w": 0}, directions=2)]),
    dict(rule=rules.identity(), aggregator=aggregators.trimmed_mean(0.2), estimator="central"),
    dict(rule=rules.identity(), aggregator=aggregators.krum(1, 2), nonfinite="exclude"),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_a_header_becomes_the_algorithm_again(options: dict[str, Any]):
    alg = hj.scalar_algorithm(quadratic_loss, 0.1, num_perturbations=3, trainable=MASK, **options)
    state = alg.init(PARAMS, KEY)
    with hj.Ledger.create(":memory:", alg, state) as ledger:
        spec = hj.Spec.from_header(json.loads(json.dumps(ledger.header)), loss_fn=quadratic_loss)
    again = algorithm(spec)
    assert again.config == alg.config and spec.sent == alg.spec.sent
    assert spec.record == alg.spec.record == ledger.shape
    assert list(again.trainable(PARAMS)) == ["w"]
    # That they take the same steps: `test_programs`, whose replays are by such algorithms.


def halving(state: Any, delta: Any, scalars: Any, last: Any) -> Any:
    return {n: hj.exact.mul(jnp.float32(0.5), x) for n, x in delta.items()}, state


OWN = rules.Rule(lambda leaves: (), lambda state, noise: noise, halving, {"rule": "halving"})


def test_a_rule_of_ones_own_replays_in_blocks():
    alg = hj.scalar_algorithm(quadratic_loss, 0.1, rule=OWN, num_perturbations=3, trainable=MASK)
    state = begin = alg.init(PARAMS, KEY)
    with hj.Ledger.create(":memory:", alg, begin) as ledger:
        for i in range(3):
            record = np.full((1, 3), i + 0.5, np.float32)
            state = jax.jit(alg.advance)(state, record)
            ledger.append(record, hj.digest(state))
        with pytest.raises(ValueError, match="halving"):
            replay.Replay(ledger)
        assert_same_bits(replay_in_blocks(ledger, PARAMS, rule=OWN), state.params)


def test_choices_are_exchanged_one_by_one():
    """Another estimator, another aggregator, another layout: nothing else has to know."""
    alg = hj.decomfl(quadratic_loss, 0.1, num_perturbations=3, smoothing=1e-2)
    made = hj.decomfl(quadratic_loss, 0.1, num_perturbations=3, smoothing=1e-2, estimator="central")
    spec = alg.spec._replace(estimator=estimators.make("central", 3, 1e-2))
    state, batches = alg.init({"w": jnp.zeros(4)}, KEY), jnp.ones((2, 1, 4))
    assert_same_bits(*(jax.jit(a.probe)(state, batches) for a in (algorithm(spec), made)))
    median = alg.spec._replace(combine=aggregators.Combine(aggregators.median()))
    scalars = np.random.default_rng(0).normal(size=(3, 1, 3)).astype(np.float32)
    np.testing.assert_allclose(
        algorithm(median).aggregate(scalars), np.median(scalars, 0), rtol=1e-6
    )


def test_a_rule_and_an_estimator_that_do_not_fit_are_refused():
    spec = hj.decomfl(quadratic_loss, 0.1, num_perturbations=4).spec
    with pytest.raises(ValueError, match="estimator: expected \"three_point\" .* got 'forward'"):
        algorithm(spec._replace(rule=rules.hizoo()))
    twice = estimators.make("three_point", 4, 1e-3, second=True)
    with pytest.raises(ValueError, match="got 'three_point'"):
        algorithm(spec._replace(estimator=twice))


@pytest.mark.parametrize("make, options, said", [
    (hj.mezo, dict(num_perturbations=8), "num_perturbations: MeZO has 1, got 8"),
    (hj.mezo, dict(local_steps=4), "local_steps: MeZO has 1, got 4"),
    (hj.mezo, dict(estimator="forward"), "estimator: MeZO has 'central', got 'forward'"),
    (hj.fzoo, dict(distribution="normal"), "distribution: FZOO has 'rademacher', got 'normal'"),
    (hj.fzoo, dict(estimator="central"), "estimator: FZOO has 'forward'"),
    (hj.hizoo, dict(estimator="central"), "estimator: HiZOO has 'three_point'"),
])  # fmt: skip
def test_named_methods_refuse_instead_of_overriding(make: Any, options: Any, said: str):
    with pytest.raises(ValueError, match=said):
        make(quadratic_loss, 0.1, **options)


def test_named_methods_take_what_they_are():
    assert hj.mezo(quadratic_loss, 0.1, num_perturbations=1).config["estimator"] == "central"
    central = estimators.central_difference
    assert hj.mezo(quadratic_loss, 0.1, estimator=central).config["estimator"] == "central"
    assert hj.fzoo(quadratic_loss, 0.1, distribution="rademacher").spec.directions.per_client == 5


def test_an_estimator_has_one_name():
    """By its name or as the function: the same config, and the same right to be used."""
    both = ("forward", estimators.forward_difference)
    first, second = (hj.decomfl(quadratic_loss, 0.1, estimator=e, upper=UPPER) for e in both)
    assert first.config == second.config


def mine(scalars: jax.Array, weights: jax.Array) -> jax.Array:
    return scalars.mean(0)


@pytest.mark.parametrize("options", [
    dict(aggregator=lambda scalars, weights: scalars.mean(0)),
    dict(estimator=lambda *args: estimators.forward_difference(*args)),
])  # fmt: skip
def test_what_has_no_name_is_not_written_down(options: dict[str, Any]):
    """Two lambdas would look the same to a ledger."""
    alg = hj.decomfl(quadratic_loss, 0.1, **options)
    with pytest.raises(ValueError, match=f"its {next(iter(options))} has no name"):
        hj.Ledger.create(":memory:", alg, alg.init({"w": jnp.zeros(3)}, KEY))
    named = hj.decomfl(quadratic_loss, 0.1, aggregator=mine)
    assert named.config["aggregator"] == "mine"
    called = aggregators.Aggregator(lambda scalars, weights: scalars.mean(0), "the mean")
    assert hj.decomfl(quadratic_loss, 0.1, aggregator=called).config["aggregator"] == "the mean"


def test_a_client_of_one_step_does_not_take_it():
    """With directions of its own and K = 1 nothing but the measurement is traced."""
    sizes = []
    for steps in (1, 2):
        alg = hj.scalar_algorithm(
            quadratic_loss, 0.1, rule=rules.rms(), per_client_directions=2, local_steps=steps
        )
        state = alg.init({"w": jnp.zeros(4)}, KEY)
        program = jax.make_jaxpr(alg.probe)(state, jnp.ones((2, steps, 4)))
        sizes.append(str(program).count("\n"))
    plain = hj.scalar_algorithm(quadratic_loss, 0.1, rule=rules.rms())
    shared = str(jax.make_jaxpr(plain.probe)(state, jnp.ones((2, 1, 4)))).count("\n")
    assert sizes[0] < 1.5 * shared and sizes[0] < 0.8 * sizes[1]


def test_importing_starts_no_backend():
    """So that jax.distributed.initialize can still be called."""
    code = (
        "import hiso_jax as hj; from jax._src import xla_bridge\n"
        "hj.replay, hj.simulation, hj.server, hj.pool, hj.snapshots, hj.layout\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


def test_the_lower_part_takes_no_copy_of_its_layers():
    """F1: layers that are passed through to a cut are looked up one by one."""
    from transformers import OPTConfig

    from hiso_jax import models

    config = OPTConfig(vocab_size=512, hidden_size=128, num_hidden_layers=16, ffn_dim=512,
                       num_attention_heads=4, word_embed_proj_dim=128, max_position_embeddings=32)  # fmt: skip
    shapes = jax.eval_shape(lambda: models.from_config(config, KEY).params)
    model = models.from_config(config, KEY)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    ids = jnp.ones((1, 4), jnp.int32)
    program = jax.jit(lambda p: model.lower(p, ids, ids, 14)).lower(shapes).compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.25 * held
