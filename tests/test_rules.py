"""Every rule: as its paper writes it, rebuilt from its config; the same bits: `test_programs`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import directions, rules
from hiso_jax.ledger import pool
from tests.helpers import CONTROL, CORRECT, assert_same_bits, equations, odd_loss, odd_tree

P, RATE, SMOOTHING, STEPS = 4, 0.02, 1e-2, 6
Params = dict[str, np.ndarray]


def loss(x: Params, batch: Any) -> Any:
    """Two leaves of unlike curvature; jnp and np alike."""
    return ((x["a"] - batch) ** 2).sum() + 3 * (x["b"] ** 2).sum() + x["a"][0] * x["b"][0]


def noises(step: int, law: Any) -> list[Params]:
    """What the shared key says, as NumPy arrays."""
    drawn = [_noise(step, p, law) for p in range(P)]
    return [{n: np.asarray(u, np.float64) for n, u in own.items()} for own in drawn]


@functools.partial(jax.jit, static_argnames="law")
def _noise(step: int, p: int, law: Any) -> dict[str, jax.Array]:
    key = directions.direction_key(jax.random.key(5), step, 0, p)
    return directions.noise(key, {"a": jnp.zeros(40), "b": jnp.zeros(3)}, law)


def axpy(x: Params, scale: float, z: Params) -> Params:
    return {n: x[n] + scale * z[n] for n in x}


def mean(rows: list[Params]) -> Params:
    return {n: sum(row[n] for row in rows) / len(rows) for n in rows[0]}


# The papers' algorithms on one machine, a step each: (x, state, noise, f) -> (x, state).


def hiso(x: Params, h: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    h = h or {n: np.ones_like(v) for n, v in x.items()}
    zs = [{n: u[n] / np.sqrt(h[n]) for n in u} for u in us]
    gs = [(f(axpy(x, SMOOTHING, z)) - f(x)) / SMOOTHING for z in zs]
    delta = mean([{n: g * z[n] for n in z} for g, z in zip(gs, zs, strict=True)])
    h = {n: 0.95 * h[n] + 0.05 * (delta[n] ** 2 + 1e-8) for n in h}
    return axpy(x, -RATE, delta), h


def meazo(x: Params, state: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    v, t = state or (0.0, 0)
    gs = [(f(axpy(x, SMOOTHING, u)) - f(axpy(x, -SMOOTHING, u))) / (2 * SMOOTHING) for u in us]
    v, t = 0.9 * v + 0.1 * np.mean(gs) ** 2, t + 1
    delta = mean([{n: g * u[n] for n in u} for g, u in zip(gs, us, strict=True)])
    return axpy(x, -RATE / np.sqrt(v / (1 - 0.9**t)), delta), (v, t)


def rms(x: Params, state: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    v, t = state or (0.0, 0)
    gs = [(f(axpy(x, SMOOTHING, u)) - f(x)) / SMOOTHING for u in us]
    v, t = 0.9 * v + 0.1 * np.mean(np.square(gs)), t + 1
    delta = mean([{n: g * u[n] for n in u} for g, u in zip(gs, us, strict=True)])
    return axpy(x, -RATE / np.sqrt(v / (1 - 0.9**t)), delta), (v, t)


def fzoo(x: Params, state: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    """In the paper's terms: losses, and its learning rate."""
    losses = [f(axpy(x, SMOOTHING, u)) for u in us]
    step = mean([{n: (value - f(x)) / SMOOTHING * u[n] for n in u}
                 for value, u in zip(losses, us, strict=True)])  # fmt: skip
    return axpy(x, -(RATE * SMOOTHING) / np.std(losses, ddof=1), step), state


def hizoo(x: Params, h: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    """One curvature matrix, whose mean over directions is taken before its absolute value."""
    h = h or {n: np.ones_like(v) for n, v in x.items()}
    zs = [{n: u[n] / np.sqrt(h[n]) for n in u} for u in us]
    up = [f(axpy(x, SMOOTHING, z)) for z in zs]
    down = [f(axpy(x, -SMOOTHING, z)) for z in zs]
    gs = [(a - b) / (2 * SMOOTHING) for a, b in zip(up, down, strict=True)]
    seconds = [(a + b - 2 * f(x)) / (2 * SMOOTHING**2) for a, b in zip(up, down, strict=True)]
    delta = mean([{n: g * z[n] for n in z} for g, z in zip(gs, zs, strict=True)])
    new = mean([{n: c * u[n] ** 2 * h[n] for n in u} for c, u in zip(seconds, us, strict=True)])
    return axpy(x, -RATE, delta), {n: 0.99 * h[n] + 0.01 * abs(new[n]) for n in h}


def momentum(x: Params, m: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    m = m or {n: np.zeros_like(v) for n, v in x.items()}
    gs = [(f(axpy(x, SMOOTHING, u)) - f(x)) / SMOOTHING for u in us]
    delta = mean([{n: g * u[n] for n in u} for g, u in zip(gs, us, strict=True)])
    m = {n: 0.8 * m[n] + delta[n] for n in m}
    return axpy(x, -RATE, m), m


def adam(x: Params, state: Any, us: list[Params], f: Callable[[Params], float]) -> Any:
    zeros = {n: np.zeros_like(v) for n, v in x.items()}
    m, v, t = state or (zeros, zeros, 0)
    gs = [(f(axpy(x, SMOOTHING, u)) - f(x)) / SMOOTHING for u in us]
    delta = mean([{n: g * u[n] for n in u} for g, u in zip(gs, us, strict=True)])
    t += 1
    m = {n: 0.9 * m[n] + 0.1 * delta[n] for n in m}
    v = {n: 0.99 * v[n] + 0.01 * delta[n] ** 2 for n in v}
    step = {n: m[n] / (1 - 0.9**t) / (np.sqrt(v[n] / (1 - 0.99**t)) + 1e-8) for n in m}
    return axpy(x, -RATE, step), (m, v, t)


PAPERS = {
    "hiso": (hiso, dict(), "normal", "forward"),
    "meazo": (meazo, dict(decay=0.9), "normal", "central"),
    "rms": (rms, dict(decay=0.9), "normal", "forward"),
    "fzoo": (fzoo, dict(), "rademacher", "forward"),
    "hizoo": (hizoo, dict(decay=0.99), "normal", "three_point"),
    "momentum": (momentum, dict(decay=0.8), "rademacher", "forward"),
    "adam": (adam, dict(b2=0.99), "normal", "forward"),
}


def test_every_rule_is_compared_with_its_paper():
    assert PAPERS.keys() | {"identity"} == rules.RULES.keys()


@pytest.mark.parametrize("name", PAPERS)
def test_as_in_its_paper(name: str):
    paper, arguments, law, estimator = PAPERS[name]
    alg = hj.scalar_algorithm(
        loss, RATE, rule=rules.RULES[name](**arguments), num_perturbations=P,
        smoothing=SMOOTHING, distribution=law, estimator=estimator,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    x = {"a": rng.normal(size=40), "b": rng.normal(size=3)}
    ours = alg.init({n: jnp.asarray(v, jnp.float32) for n, v in x.items()}, jax.random.key(5))
    round, memory = jax.jit(alg.round, donate_argnums=0), None
    for step in range(STEPS):
        batch = rng.normal(size=40)
        x, memory = paper(x, memory, noises(step, law), lambda x, b=batch: loss(x, b))
        ours, metrics = round(ours, jnp.asarray(batch, jnp.float32)[None, None])
        assert np.isfinite(metrics.record).all()
    for n, wanted in x.items():
        # float32 losses, in differences over the smoothing
        np.testing.assert_allclose(ours.params[n], wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", rules.RULES)
def test_a_config_makes_the_rule_again(name: str):
    rule = rules.RULES[name]()
    assert rules.from_config(rule.config or {}).config == rule.config


@pytest.mark.parametrize("name", rules.RULES)
def test_only_correctly_rounded_operations(name: str):
    """As of HiSo in `test_portable`: no division or root of floats, no sum of unknown order."""
    rule = rules.RULES[name]()
    alg = hj.scalar_algorithm(
        lambda params, batch: jnp.float32(0), 0.1, rule=rule, local_steps=2, seed_pool=9,
        estimator="three_point" if rule.second else "forward",
    )  # fmt: skip
    state = alg.init({"w": jnp.ones((7, 9))}, jax.random.key(0))
    record = jnp.ones((2, 10 if rule.second else 5))
    every = list(equations(jax.make_jaxpr(alg.advance)(state, record).jaxpr))
    products = {id(v) for e in every if e.primitive.name == "mul"
                for v in e.outvars if "float" in str(v.aval.dtype)}  # fmt: skip
    # A product that is added as it is may be fused with the sum.
    assert not [e for e in every if e.primitive.name in ("add", "sub")
                and any(id(v) in products for v in e.invars)]  # fmt: skip
    for equation in every:
        kind = equation.primitive.name
        assert kind in CORRECT | CONTROL, kind
        if kind in ("div", "rem", "reduce_sum"):
            assert not any("float" in str(v.aval.dtype) for v in equation.invars), kind


def on_a_plain(name: str) -> hj.Algorithm:
    """A rule of the library with a loss that is 1 everywhere."""
    rule = rules.RULES[name]()
    return hj.scalar_algorithm(
        lambda p, b: jnp.float32(1) + 0 * p["w"].sum(), 1e-2, rule=rule,
        estimator="three_point" if rule.second else "forward",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["rms", "meazo", "fzoo", "adam", "hizoo"])
def test_scalars_of_zero_move_nothing(name: str):
    alg = on_a_plain(name)
    start = alg.init({"w": jnp.ones(5)}, jax.random.key(0))
    end, _ = jax.jit(alg.round)(start, jnp.ones((2, 1, 5)))
    np.testing.assert_array_equal(end.params["w"], start.params["w"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(end.rule))


@pytest.mark.parametrize("name", rules.RULES)
def test_no_record_of_scalars_that_count_makes_a_model_nan(name: str):
    """One of twenty clients may send so much, in every round, and alone where they are few."""
    alg = on_a_plain(name)
    state, advance = alg.init({"w": jnp.ones(5)}, jax.random.key(0)), jax.jit(alg.advance)
    width, rng = alg.spec.record[1], np.random.default_rng(0)
    sizes = [hj.aggregators.MOST] * 20 + [1, 0, hj.aggregators.MOST / 20, 1e-3] * 3
    for size in sizes:
        record = np.float32(size) * np.sign(rng.normal(size=(1, width))).astype(np.float32)
        record[0, : width // 2] = 1
        state = advance(state, record)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.rule)))


def test_rms_does_not_care_for_the_loss_s_unit():
    ends = []
    for unit in (1.0, 2.0**10):
        alg = hj.scalar_algorithm(
            lambda p, b, unit=unit: unit * ((p["w"] - b) ** 2).mean(), 0.1, rule=rules.rms()
        )
        state = alg.init({"w": jnp.arange(5.0)}, jax.random.key(0))
        for _ in range(3):
            state, _ = jax.jit(alg.round)(state, jnp.ones((2, 1, 5)))
        ends.append(state.params["w"])
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_estimator_and_rule_must_fit():
    for rule, estimator in ((rules.hizoo(), "forward"), (rules.hiso(), "three_point")):
        with pytest.raises(ValueError, match="three_point.*got"):
            hj.scalar_algorithm(loss, 0.1, rule=rule, estimator=estimator)
    with pytest.raises(ValueError, match="at least 2"):
        alg = hj.fzoo(loss, 0.1, num_perturbations=1)
        start = alg.init({"a": jnp.ones(40), "b": jnp.ones(3)}, jax.random.key(0))
        alg.advance(start, jnp.ones((1, 1)))


@pytest.mark.parametrize("name", [n for n, r in rules.RULES.items() if not r().carried])
def test_a_step_that_clients_carry_no_state_for_does_not_depend_on_it(name: str):
    rule, leaves = rules.RULES[name](), {"w": jnp.linspace(-1, 1, 9)}
    delta: Any = ({"w": leaves["w"] ** 2}, leaves) if rule.second else {"w": leaves["w"] ** 2}
    start = rule.init(leaves)
    steps = [
        rule.update(state, delta, jnp.ones(4), jnp.array(True))[0]["w"]
        for state in (start, jax.tree.map(lambda x: 3 * x + 1, start))
    ]
    assert_same_bits(*steps)


def test_hizoo_learns_the_curvature_of_a_quadratic():
    """Its fixed point has |mean(c u^2)| / 2 = 1: H in proportion to curvature, per element."""
    scale = jnp.array([1.0, 4.0, 16.0])
    alg = hj.hizoo(
        lambda p, b: (scale * p["w"] ** 2).sum() / 2, 0.0, decay=0.99, num_perturbations=64,
        smoothing=0.1,
    )  # fmt: skip
    state = alg.init({"w": jnp.ones(3)}, jax.random.key(0))
    step = jax.jit(alg.round)
    for _ in range(600):
        state, _ = step(state, jnp.ones((1, 1, 1)))
    h = np.asarray(state.rule.curvature["w"])
    assert h[0] < h[1] < h[2]


def test_a_pool_s_numbers_are_the_model():
    """Some directions repeat; the sums by direction agree with the replayed model."""
    alg = hj.fedkseed(odd_loss, 1e-2, seed_pool=7, local_steps=2, distribution="rademacher")
    params = odd_tree()["second"]
    start = state = alg.init(params, jax.random.key(1))
    advance = jax.jit(alg.advance)
    with hj.Ledger.create(":memory:", alg, start) as written:
        for i in range(6):
            record = np.random.default_rng(i).normal(size=(2, 5)).astype(np.float32)
            state = advance(state, record)
            written.append(record, hj.digest(state), 1e-2)
        weights = pool.accumulate(written)
    moved = pool.apply(params, start.key, weights, distribution="rademacher")
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert len(set(np.asarray(_picks(start.key, 7)))) == 7


def _picks(key: jax.Array, size: int) -> list[int]:
    return [int(directions.pool_pick(key, r, 0, p, size)) for r in range(12) for p in range(5)]


def test_pools_that_are_none():
    with pytest.raises(TypeError, match="seed_pool: .*None"):
        hj.fedkseed(odd_loss, 1e-2, seed_pool=None)
    with pytest.raises(ValueError, match="seed_pool: .*4.29497e"):
        hj.fedkseed(odd_loss, 1e-2, seed_pool=2**32)


def test_a_run_without_a_pool_has_no_numbers():
    alg = hj.decomfl(odd_loss, 1e-2)
    start = alg.init(odd_tree()["second"], jax.random.key(1))
    with hj.Ledger.create(":memory:", alg, start) as written:
        with pytest.raises(ValueError, match="without a seed pool"):
            pool.accumulate(written)
    hiso = hj.federated_hiso(odd_loss, 1e-2, seed_pool=9)
    with hj.Ledger.create(":memory:", hiso, hiso.init(odd_tree(), jax.random.key(1))) as other:
        with pytest.raises(ValueError, match="identity rule only"):
            pool.accumulate(other)


def test_a_client_s_own_directions_are_its_part_of_the_record():
    """Each client's scalars are those it would send if its directions were the shared ones."""
    common: dict[str, Any] = dict(smoothing=1e-2, distribution="normal")
    own = hj.federated_hiso(odd_loss, 1e-2, per_client_directions=3, num_perturbations=2, **common)
    wide = hj.federated_hiso(odd_loss, 1e-2, num_perturbations=6, **common)
    params = odd_tree()["second"]
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 4)), jnp.float32)
    start = own.init(params, jax.random.key(1))
    every = np.asarray(jax.jit(wide.probe)(wide.init(params, jax.random.key(1)), batches))
    scalars = np.asarray(jax.jit(own.probe)(start, batches))
    assert scalars.shape == (3, 1, 2)
    for c in range(3):
        np.testing.assert_allclose(scalars[c], every[c, :, 2 * c : 2 * c + 2], rtol=1e-4, atol=1e-4)
    alone = jax.jit(own.probe)  # one program for every place
    for c in (1, 2):
        found = alone(start, batches[c : c + 1], c)[0]
        np.testing.assert_allclose(found, scalars[c], rtol=1e-4, atol=1e-4)
    weights = np.array([1.0, 0.0, 3.0], np.float32)
    record = np.asarray(own.aggregate(scalars, weights))
    assert record.shape == (1, 6)
    np.testing.assert_allclose(record[0, :2], 0.75 * scalars[0, 0], rtol=1e-6)
    np.testing.assert_array_equal(record[0, 2:4], 0)
    np.testing.assert_allclose(record[0, 4:], 2.25 * scalars[2, 0], rtol=1e-6)
    ends = [jax.jit(a.advance)(start, record) for a in (own, wide)]
    assert_same_bits(*ends)


def test_a_server_keeps_everybody_s_place():
    alg = hj.decomfl(odd_loss, 1e-2, per_client_directions=3, num_perturbations=2)
    params = {"w": jnp.linspace(-1, 1, 7)}
    start = alg.init(params, jax.random.key(1))
    batches = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 4)), jnp.float32)
    with hj.Ledger.create(":memory:", alg, start) as written:
        server = hj.server.Server(alg, start, written)
        with pytest.raises(ValueError, match="at most per_client_directions=3, got 4"):
            server.open(["a", "b", "c", "d"])
        server.open(["a", "b", "c"])
        for place, name in ((2, "c"), (0, "a")):  # b never answers
            scalars = alg.probe(start, batches[place : place + 1], slot=place)[0]
            assert server.reply(name, 0, scalars)
        record = server.close()
    whole = alg.aggregate(alg.probe(start, batches), jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose(record, whole, rtol=1e-5, atol=1e-6)
    assert (record[0, 2:4] == 0).all()


def test_own_directions_are_refused_where_they_make_no_sense():
    with pytest.raises(ValueError, match="per_client_directions have nothing in common"):
        hj.decomfl(loss, 0.1, per_client_directions=2, aggregator=hj.aggregators.median())
    alg = hj.decomfl(odd_loss, 0.1, per_client_directions=2)
    start = alg.init({"w": jnp.ones(3)}, jax.random.key(0))
    with pytest.raises(ValueError, match="3 clients from place 0"):
        alg.probe(start, jnp.ones((3, 1, 2)))
    with pytest.raises(ValueError, match="1 clients from place 2"):
        alg.probe(start, jnp.ones((1, 1, 2)), slot=2)
    with pytest.raises(ValueError, match="at most per_client_directions=2"):
        alg.aggregate(jnp.ones((3, 1, 5)))


@pytest.mark.parametrize("make, name", [
    (lambda: hj.rules.rms(1.0), "decay"), (lambda: hj.rules.meazo(1.0), "decay"),
    (lambda: hj.rules.adam(b1=1.0), "b1"), (lambda: hj.rules.adam(b2=1.0), "b2"),
])  # fmt: skip
def test_an_average_that_takes_nothing_new_is_refused(make: Any, name: str):
    with pytest.raises(ValueError, match=f"{name}: expected a finite number >= 0 and < 1, got 1"):
        make()
