"""Curvature of any granularity against its formulas, and rules that look at whole leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from experiments import granularity
from hiso_jax import rules
from hiso_jax._engine import elementwise
from hiso_jax.rules import Rule
from tests.helpers import assert_same_bits, laid_out, odd_loss, replay_in_blocks

SHAPES = {"net/layer/fc/kernel": (2, 3, 4), "net/layer/fc/bias": (2, 4), "head/kernel": (2, 3, 5)}
LAST = jnp.bool_(True)
Arrays = dict[str, Any]


def normal(seed: int, shapes: Any = SHAPES) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        n: rng.normal(size=s).astype(np.float32) * 3**i for i, (n, s) in enumerate(shapes.items())
    }


def after(rule: Rule, deltas: list[Arrays], scalars: int = 4) -> tuple[Any, Any]:
    """The last step of a rule, and its state."""
    state, step = rule.init(deltas[0]), None
    update = jax.jit(rule.update)
    for delta in deltas:
        step, state = update(state, delta, jnp.ones(scalars), LAST)
    return step, state


def close(found: Any, wanted: Any, rtol: float = 2e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=rtol, atol=1e-6 * np.abs(x).max())


def averaged(squares: list[Any], where: str, start: Any = 1.0, count: int = 4) -> Any:
    """H of the squares of several steps: from a start on as HiSo's, or free of a start at zero."""
    if where == "step":
        weights = [0.99**i for i in range(len(squares))][::-1]
        return count * sum(w * x for w, x in zip(weights, squares, strict=True)) / sum(weights)
    h = start
    for x in squares:
        h = 0.95 * h + 0.05 * (x + 1e-8 * start)
    return h


def root(a: np.ndarray) -> np.ndarray:
    """a^-1/2."""
    values, vectors = np.linalg.eigh(a)
    return (vectors * values**-0.5) @ vectors.T


BLOCKS = {  # leaf -> block, or its layers' blocks
    "layer": {"net/layer/fc/kernel": (0, 1), "net/layer/fc/bias": (0, 1), "head/kernel": 2},
    "leaf": {"net/layer/fc/kernel": (0, 1), "net/layer/fc/bias": (2, 3), "head/kernel": 4},
    "model": {"net/layer/fc/kernel": 0, "net/layer/fc/bias": 0, "head/kernel": 0},
}


@pytest.mark.parametrize("where", granularity.WHERE)
@pytest.mark.parametrize("each", granularity.EACH)
def test_a_number_a_block_is_its_mean_square(each: str, where: str):
    deltas, numbers = [normal(i) for i in range(3)], {}
    for name, shape in SHAPES.items():  # of every element, its block
        own = np.array(BLOCKS[each][name])
        numbers[name] = np.broadcast_to(
            own.reshape(own.shape + (1,) * (len(shape) - own.ndim)), shape
        )
    flat = lambda x: np.concatenate([x[n].ravel() for n in SHAPES])  # noqa: E731
    block = flat(numbers)
    means = [np.bincount(block, flat(d).astype(float) ** 2) / np.bincount(block) for d in deltas]
    rule = granularity.block_rule(each, where)
    step, state = after(rule, deltas)
    inverse = 1 / np.sqrt(averaged(means, where))
    whitened = lambda x: {n: inverse[numbers[n]] * x[n] for n in SHAPES}  # noqa: E731
    noise = normal(9)
    if where == "step":
        close(step, whitened(deltas[-1]))
        assert rule.direction(state, noise) is noise
    else:
        assert_same_bits(step, deltas[-1])
        close(jax.jit(rule.direction)(state, noise), whitened(noise))


@pytest.mark.parametrize("where", granularity.WHERE)
def test_two_matrices_a_matrix(where: str):
    deltas, noise = [normal(i) for i in range(3)], normal(9)
    rule = granularity.kronecker_rule(where)
    step, state = after(rule, deltas)
    given, found = (
        (deltas[-1], step) if where == "step" else (noise, jax.jit(rule.direction)(state, noise))
    )

    def matrix(index: Any, name: str, shape: tuple[int, int]) -> np.ndarray:
        own, (m, n) = [d[name][index].reshape(shape).astype(float) for d in deltas], shape
        left = averaged([g @ g.T for g in own], where, start=n * np.eye(m))
        right = averaged([g.T @ g for g in own], where, start=m * np.eye(n))
        whole = root(left) @ given[name][index].reshape(shape) @ root(right)
        return (np.sqrt(np.trace(left)) * whole).reshape(given[name][index].shape)

    layers = [matrix(i, "net/layer/fc/kernel", (3, 4)) for i in range(2)]
    bias = "net/layer/fc/bias"
    squares = averaged([d[bias].astype(float) ** 2 for d in deltas], where)
    wanted = {
        "net/layer/fc/kernel": np.stack(layers),
        bias: given[bias] / np.sqrt(squares),
        "head/kernel": matrix(..., "head/kernel", (6, 5)),
    }
    close(found, wanted, rtol=1e-3)


def test_blocks_of_one_element_are_hiso():
    deltas = [normal(i, {"a": (), "b": (1,), "c": (1, 1)}) for i in range(3)]
    own, hiso = granularity.block_rule("leaf"), rules.hiso()
    (step, state), (wanted, theirs) = after(own, deltas), after(hiso, deltas)
    assert_same_bits(step, wanted)
    noise = normal(7, {"a": (), "b": (1,), "c": (1, 1)})
    turned = jax.jit(lambda a, b, u: (own.direction(a, u), hiso.direction(b, u)))
    assert_same_bits(*turned(state, theirs, noise))


def test_one_block_and_one_sign_direction_are_rms():
    own, rms = granularity.block_rule("model", "step"), rules.rms()
    signs = {n: np.sign(x) for n, x in normal(0).items()}

    @jax.jit
    def both(states: Any, g: Any) -> Any:
        delta = {n: g * x for n, x in signs.items()}
        made = [r.update(s, delta, g[None], LAST) for r, s in zip((own, rms), states, strict=True)]
        return [step for step, _ in made], [state for _, state in made]

    states = [own.init(signs), rms.init(signs)]
    for g in (0.5, -3.0, 0.1):
        (step, wanted), states = both(states, jnp.float32(g))
        close(step, wanted, rtol=1e-6)


def test_matrices_turn_with_the_basis():
    """A step in another orthonormal basis is the step in that basis: so is no diagonal's."""
    rng = np.random.default_rng(1)
    a, b = (np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in (6, 4))
    deltas = [normal(i, {"w": (6, 4)}) for i in range(4)]
    turned: list[Arrays] = [{"w": a @ d["w"] @ b} for d in deltas]
    rule = granularity.kronecker_rule("step")
    step, there = after(rule, deltas)[0], after(rule, turned)[0]
    close(there, {"w": a @ np.asarray(step["w"]) @ b}, rtol=1e-3)
    adam = rules.adam(b1=0)
    plain, other = after(adam, deltas)[0], after(adam, turned)[0]
    assert np.abs(other["w"] - a @ plain["w"] @ b).max() > 0.1


def test_a_second_moment_that_is_a_product_is_found():
    """Of all A^1/2 e_i e_j' B^1/2 the second moment is A x B / (m n)."""
    rng = np.random.default_rng(2)
    a_root, b_root = positive(rng, 3), positive(rng, 5)
    kind, start = granularity._matrices(), {"w": jnp.zeros((3, 5))}
    state, add = kind.start(start, 0.0), jax.jit(kind.add)
    for i in range(15):  # an average of all, each with the same weight
        unit = np.zeros(15)
        unit[i] = 1
        g = a_root @ unit.reshape(3, 5) @ b_root
        state = add(state, {"w": jnp.asarray(g, jnp.float32)}, i / (i + 1), 0.0)
    x = rng.normal(size=(3, 5))
    found = kind.whiten(state, {"w": jnp.asarray(x, jnp.float32)}, 1.0)
    wanted = np.sqrt(15) * np.linalg.inv(a_root) @ x @ np.linalg.inv(b_root)
    close(found, {"w": wanted}, rtol=1e-3)


def positive(rng: np.random.Generator, size: int) -> np.ndarray:
    x = rng.normal(size=(size, size))
    return x @ x.T / size + np.eye(size)


def test_a_long_side_has_no_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(granularity, "LONGEST", 4)
    deltas = [normal(i, {"w": (6, 4), "long": (6, 5)}) for i in range(3)]
    step, state = after(granularity.kronecker_rule("step"), deltas)
    assert state.curvature["w"].left is None and state.curvature["long"].squares.shape == (6, 5)
    wanted = deltas[-1]["w"] @ root(averaged([d["w"].T @ d["w"] for d in deltas], "step") / 6)
    close({"w": step["w"]}, {"w": wanted}, rtol=1e-3)


def test_sums_do_not_depend_on_the_program():
    x = np.random.default_rng(0).normal(size=(3, 9001)).astype(np.float32)
    found = jax.jit(granularity.total)(x)
    np.testing.assert_allclose(found, x.astype(float).sum(1), atol=1e-3)
    assert_same_bits(found, jnp.concatenate([granularity.total(row[None]) for row in x]))


@pytest.mark.parametrize("steps, rule", [
    pytest.param(1, granularity.block_rule("layer"), id="blocks"),
    pytest.param(2, granularity.kronecker_rule("step"), id="kronecker", marks=[pytest.mark.slow, pytest.mark.ci]),
])  # fmt: skip
def test_a_rule_of_whole_leaves_is_replayed_to_the_bit(steps: int, rule: Rule):
    """Packed or not, in one program with the clients or alone; but not in blocks."""
    params = {n: jnp.asarray(x) for n, x in normal(3).items()}
    alg = hj.scalar_algorithm(
        odd_loss, 1e-2, rule=rule, local_steps=steps, num_perturbations=3, distribution="rademacher"
    )
    start = state = alg.init(params, jax.random.key(0))
    whole = jax.jit(laid_out(alg, small=1).advance)
    round, other = jax.jit(alg.round), start
    with hj.Ledger.create(":memory:", alg, start) as ledger:
        for i in range(3):
            state, metrics = round(state, jnp.full((2, steps, 5), float(i)))
            ledger.append(metrics.record, hj.digest(state))
            other = whole(other, metrics.record)
            assert_same_bits(other, state)
        with pytest.raises(ValueError, match="cannot be replayed in blocks; replay its records wi"):
            replay_in_blocks(ledger, params, rule)
        records = ledger.records()
        end = jax.jit(alg.replay)(start, records.scalars, records.learning_rates)
    assert_same_bits(end, state)
    assert not np.array_equal(end.params["head/kernel"], params["head/kernel"])


def norm(elementwise: bool) -> Rule:
    """Every leaf's step has length one."""

    def update(state: Any, delta: Any, scalars: Any, last: Any) -> Any:
        return {n: d / jnp.sqrt((d * d).sum()) for n, d in delta.items()}, state

    init, direction = lambda leaves: (), lambda state, u: u
    return Rule(init, direction, update, {"rule": "norm"}, elementwise=elementwise)


def test_a_rule_that_does_not_say_that_it_needs_whole_leaves_is_refused():
    """It would be given packs: here one step of length one for both leaves, and no error."""
    with pytest.raises(
        ValueError, match=r"update looks at more .*\(reduce_sum\).*elementwise=False"
    ):
        hj.scalar_algorithm(odd_loss, 0.1, rule=norm(True))
    turned = norm(True)._replace(
        direction=lambda state, u: {n: x[..., ::-1] for n, x in u.items()},
        update=lambda state, delta, scalars, last: (delta, state),
    )
    with pytest.raises(ValueError, match=r"direction looks at more .*\(rev\)"):
        hj.scalar_algorithm(odd_loss, 0.1, rule=turned)
    alg = hj.scalar_algorithm(odd_loss, 0.5, rule=norm(False))
    params = {"a": jnp.ones(7), "b": jnp.ones((3, 4))}
    start = alg.init(params, jax.random.key(0))
    end = alg.advance(start, jnp.ones((1, 5)))
    for name, x in params.items():
        assert float(jnp.linalg.norm(end.params[name] - x)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("name", rules.RULES)
def test_the_rules_of_the_library_work_element_by_element(name: str):
    rule = rules.RULES[name]()
    own = rule._replace(config={"rule": "mine"})
    assert rule.elementwise and rules.check(own) is own and rules.check(rule) is rule


@pytest.mark.parametrize("elementwise", [True, False])
def test_functions_of_ones_own_may_not_have_the_name_of_a_rule_of_the_library(elementwise: bool):
    """A ledger would build that one."""
    rule = rules.hiso()._replace(direction=lambda s, u: u, elementwise=elementwise)
    with pytest.raises(ValueError, match="'hiso'.*give config="):
        hj.scalar_algorithm(odd_loss, 0.1, rule=rule)


ROWS, KERNEL = np.array([3, 0, 2, 5, 1, 4]), jnp.ones((1, 1, 3))


def test_what_mixes_elements():
    x, lax = jnp.ones((6, 5)), jax.lax
    unit = lambda row: row / jnp.linalg.norm(row)  # noqa: E731
    sums = lambda sum, row: (sum + row, sum + row)  # noqa: E731
    for function in (jnp.sort, jnp.cumsum, lambda x: x.T, lambda x: x @ x.T, lambda x: x / x.max(),
                     lambda x: jnp.roll(x, 1), lambda x: x[:, :2], lambda x: jnp.var(x) * x,
                     lambda x: lax.fori_loop(0, 3, lambda i, y: y - y.mean(), x),
                     lambda x: jnp.where(jnp.isfinite(x).all(), x, 0), lambda x: x[ROWS],
                     lambda x: x.at[ROWS].set(x), lambda x: lax.top_k(x, 5)[0],
                     lambda x: lax.conv_general_dilated(x[:, None], KERNEL, (1,), "SAME"),
                     lambda x: lax.reduce_window(x, 0.0, lax.add, (3, 1), (1, 1), "SAME"),
                     lambda x: jax.pure_callback(np.asarray, x, x), lambda x: lax.map(unit, x),
                     jax.vmap(unit), lambda x: lax.scan(sums, jnp.zeros(5), x)[1]):  # fmt: skip
        assert elementwise.mixing(x.size, function, x), function
    for function in (jnp.tanh, lambda x: x.reshape(-1) * 2, lambda x: jnp.where(x > 0, x, 1),
                     lambda x: lax.fori_loop(0, 3, lambda i, y: y * 0.5, x),
                     lambda x: lax.cond(True, jax.nn.relu, jax.nn.gelu, x),
                     lambda x: jnp.clip(lax.optimization_barrier((x, 1.0))[0], -1, 1) ** 2 % 3,
                     lambda x: jnp.full_like(x, 3)):  # fmt: skip
        assert elementwise.mixing(x.size, function, x) is None, function


@pytest.mark.parametrize("function", [
    lambda x: x * jnp.arange(5.0)[None], lambda x: x * jax.lax.iota(float, 30).reshape(6, 5),
    lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    lambda x: x + jax.lax.map(lambda i: i + jnp.zeros(5), jnp.arange(6.0)),
])  # fmt: skip
def test_what_depends_on_where_an_element_stands(function: Any):
    """A block of a leaf would begin at its own first place."""
    assert elementwise.mixing(30, function, jnp.ones((6, 5)))
