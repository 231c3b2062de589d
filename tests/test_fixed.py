"""Sums on a grid: exact, the same in every order, and never wrapped around."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import privacy
from hiso_jax.privacy import fixed
from tests.helpers import quadratic_loss

GRID = privacy.Grid(step=2.0**-12, bound=100.0, max_clients=40, max_weight=9)
FLOATS = st.floats(-100, 100, width=32)
REPLIES = st.lists(st.tuples(st.lists(FLOATS, min_size=3, max_size=3), st.integers(1, 9)),
                   min_size=1, max_size=40)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(REPLIES, st.randoms())
def test_the_mean_is_exact_in_any_order(replies: list[Any], random: Any):
    vectors = [GRID.encode(np.array([s]), weight=w) for s, w in replies]
    total = GRID.add(vectors)
    GRID.check_sum(total, len(vectors))
    again = vectors.copy()
    random.shuffle(again)
    half = len(again) // 2
    parts = [GRID.add(part) for part in (again[:half], again[half:]) if part]
    np.testing.assert_array_equal(np.sum(parts, axis=0), total)
    weight = sum(w for _, w in replies)
    for i, found in enumerate(GRID.decode(total, (1, 3))[0]):
        exact = sum(w * round(Fraction(s[i]) / Fraction(GRID.step)) for s, w in replies)
        assert found == np.float32(float(Fraction(exact, weight)) * GRID.step)
        plain = sum(w * s[i] for s, w in replies) / weight
        assert abs(found - plain) <= GRID.step / 2 + 1e-5 * abs(plain)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0.01, 50))
def test_clipped_integers_are_within_the_norm_exactly(values: list[float], bound: float):
    whole = privacy.clip([values], bound, GRID)
    assert sum(x * x for x in whole[:-1].tolist()) <= (bound / GRID.step) ** 2
    norm = np.linalg.norm(values)
    wanted = np.array(values) * min(1, bound / norm) if norm else np.array(values)
    np.testing.assert_allclose(whole[:-1] * GRID.step, wanted, atol=2 * GRID.step)
    assert whole[-1] == 1


@pytest.mark.parametrize("value", [100.1, -1e30, np.nan, np.inf])
def test_what_leaves_the_range_is_named(value: float):
    with pytest.raises(ValueError, match=r"client 'ann': .*-100 to 100 .*at \[0, 1\]"):
        GRID.encode(np.array([[1.0, value]]), client="ann")


@pytest.mark.parametrize("weight", [0, -1, 10, 1.5])
def test_weights_are_whole_numbers_in_a_range(weight: Any):
    with pytest.raises(ValueError, match="weight: client 'ann': .* 1 to 9 .*got"):
        GRID.encode(np.ones((1, 1)), weight, "ann")


def test_sums_that_might_not_fit_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="bound: 4194304 clients .*more than 2\\^62"):
        privacy.Grid(step=2.0**-20, bound=2.0**40, max_clients=2**22)
    with pytest.raises(ValueError, match="step: expected a power of two, got 0.1"):
        privacy.Grid(step=0.1)
    vector = GRID.encode(np.ones((1, 1)))
    with pytest.raises(ValueError, match="vectors: expected 1 to 40"):
        GRID.add([vector] * 41)
    with pytest.raises(ValueError, match="vectors: expected one length"):
        GRID.add([vector, GRID.encode(np.ones((1, 2)))])
    # The largest that may be: no number of 64 bits is left.
    most = privacy.Grid(step=1.0, bound=2.0**42, max_clients=2**20)
    assert GRID.limit == 409600
    assert most.add([most.encode([[2.0**42]])] * 2**10)[0] == 2**52


def test_sums_that_nobody_could_have_made_are_found():
    total = GRID.add([GRID.encode(np.full((1, 2), 100.0), 9)] * 3)
    GRID.check_sum(total, 3)
    with pytest.raises(ValueError, match="somebody's were out of range"):
        GRID.check_sum(total + np.array([0, 1, 0]), 3)
    GRID.check_sum(total + np.array([0, 1, 0]), 3, noise=1)
    with pytest.raises(ValueError, match="weight of 3 to 27"):
        GRID.check_sum(total + np.array([0, 0, 1]), 3)
    with pytest.raises(ValueError, match="total: expected int64"):
        GRID.decode(np.ones(3), (1, 2))
    assert np.isnan(GRID.decode(np.zeros(3, np.int64), (1, 2))).all()


def test_the_grid_is_in_the_header(tmp_path: Any):
    alg = hj.decomfl(quadratic_loss, 0.1)
    state = alg.init({"w": jnp.ones(33)}, jax.random.key(0))
    with hj.Ledger.create(tmp_path / "a", alg, state, privacy={"grid": GRID.config}) as ledger:
        assert privacy.Grid.from_config(ledger.header["privacy"]["grid"]) == GRID
        ledger.export(tmp_path / "b.safetensors")
    with hj.Ledger.import_(tmp_path / "b.safetensors") as ledger:  # it travels
        assert ledger.header["privacy"]["grid"] == GRID.config


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=4, max_size=4), max_size=6), st.floats(0.01, 100.0),
       st.sampled_from([GRID, privacy.Grid(step=2.0**-44, bound=2.0**10, max_clients=2)]))  # fmt: skip
def test_many_clients_at_once_are_clipped_as_one_by_one(
    values: list[list[float]], bound: float, grid: privacy.Grid
):
    """Also where squares of the integers do not fit in 64 bits."""
    scalars = np.array(values, np.float32).reshape(-1, 2, 2)
    names = [f"{i}" for i in range(len(scalars))]
    together = fixed.clip_all(scalars, bound, grid, names)
    assert together.shape == (len(names), 5)
    for one, own in zip(together, scalars, strict=True):
        np.testing.assert_array_equal(one, privacy.clip(own, bound, grid))
        exact = Fraction(bound) / Fraction(grid.step)
        assert sum(x * x for x in one[:-1].tolist()) <= exact * exact
    if len(names):
        scalars[-1, 0, 0] = np.nan
        with pytest.raises(ValueError, match=f"scalars: client '{names[-1]}': expected finite"):
            fixed.clip_all(scalars, bound, grid, names)
