"""Selectors: against NumPy transcriptions of their sources, exhaustive search and their promises."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax import selection
from hiso_jax.selection import centers, cover

KEY = jax.random.key(3)
SLOPE = jax.jit(jax.value_and_grad(centers.objective), static_argnums=6)
LOSSES = np.random.default_rng(1).gamma(1.0, size=20)
LABELS = np.arange(20) % 3
FEATURES = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
FEW = dict(steps=3)  # of Adam, where only promises count that any number keeps


def importance_picks(features, budget, key, weights):
    return selection.importance(features, budget, key, weights)[0]


SELECTORS = {
    "uniform": selection.uniform,
    "balanced": lambda x, b, key: selection.balanced(x, b, key, labels=LABELS[: len(x)]),
    "k_center": selection.k_center,
    "k_means": selection.k_means,
    "active_ft": functools.partial(selection.active_ft, **FEW),
    "vecaf": lambda x, b, key: selection.vecaf(x, b, key, LOSSES[: len(x)], **FEW),
    "vecaf, 4": lambda x, b, key: selection.vecaf(x, b, key, LOSSES[: len(x)], ensemble=4, **FEW),
    "by_score": lambda x, b, key: selection.by_score(x, b, key, LOSSES[: len(x)]),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_budget_different_examples_and_the_same_for_a_key(name):
    select = SELECTORS[name]
    for budget in (1, 7, 20):
        picks = select(FEATURES, budget, KEY)
        assert picks.shape == (budget,) and picks.dtype == np.int64
        assert len(set(picks.tolist())) == budget and set(picks.tolist()) <= set(range(20))
        np.testing.assert_array_equal(picks, select(FEATURES, budget, KEY))
    if name != "by_score":  # which has no tie to break here
        others = {tuple(select(FEATURES, 7, jax.random.key(i)).tolist()) for i in range(5)}
        assert len(others) > 1


@pytest.mark.parametrize("name", [*SELECTORS, "importance"])
def test_bad_input_is_refused(name):
    default = lambda x, b, key: importance_picks(x, b, key, LOSSES[: len(x)])  # noqa: E731
    select = SELECTORS.get(name, default)
    with pytest.raises(ValueError, match="budget: expected at most 20, one an example, got 21"):
        select(FEATURES, 21, KEY)
    with pytest.raises(ValueError, match="budget: expected an int >= 1, got 0"):
        select(FEATURES, 0, KEY)
    with pytest.raises(TypeError, match="budget"):
        select(FEATURES, 2.5, KEY)
    for broken in (np.nan, np.inf):
        bad = FEATURES.copy()
        bad[4, 2] = broken
        with pytest.raises(ValueError, match="NaN or infinite in 1 of 20 examples, the first is 4"):
            select(bad, 3, KEY)
    for shape in ((20,), (0, 5)):
        with pytest.raises(ValueError, match=r"features: expected \[N, D\]"):
            select(np.zeros(shape), 1, KEY)


@pytest.mark.parametrize("name", ["k_center", "k_means", "vecaf", "by_score", "importance"])
def test_bad_weights_are_refused(name):
    select = getattr(selection, name)
    for wrong in (np.ones(19), np.full(20, np.nan)):
        with pytest.raises(ValueError, match="weights: expected 20 finite numbers"):
            select(FEATURES, 3, KEY, wrong)
    if name in ("k_center", "k_means", "vecaf"):
        for wrong in (-LOSSES, np.zeros(20)):
            with pytest.raises(ValueError, match="weights: expected numbers >= 0 with a sum > 0"):
                select(FEATURES, 3, KEY, wrong)
    if name in ("vecaf", "by_score", "importance"):
        with pytest.raises(ValueError, match="weights: expected a .* for each example, got None"):
            select(FEATURES, 3, KEY)


def test_weights_and_labels_that_mean_nothing_are_refused():
    for select in (selection.uniform, selection.active_ft):
        with pytest.raises(ValueError, match="weights: expected None"):
            select(FEATURES, 3, KEY, LOSSES)
    with pytest.raises(ValueError, match=r"labels: expected 20, one an example, got \(19,\)"):
        selection.balanced(FEATURES, 3, KEY, labels=LABELS[:19])
    for wrong in (dict(temperature=0.0), dict(balance=-1.0), dict(steps=0), dict(ensemble=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            selection.vecaf(FEATURES, 3, KEY, LOSSES, **wrong)
    with pytest.raises(ValueError, match="share"):
        selection.importance(FEATURES, 3, KEY, LOSSES, share=1.5)


def test_examples_that_are_all_alike_are_never_taken_twice():
    same = np.ones((12, 3))
    for name in ("k_center", "k_means", "active_ft", "vecaf"):
        picks = SELECTORS[name](same, 12, KEY)
        assert sorted(picks.tolist()) == list(range(12)), name
    zeros = selection.active_ft(np.zeros((4, 3)), 2, KEY, **FEW)  # which have no direction
    assert len(set(zeros.tolist())) == 2


def test_balanced_takes_as_many_of_each_class_as_there_are():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 2)
    picks = selection.balanced(np.zeros((82, 1)), 20, KEY, labels=labels)
    assert np.bincount(labels[picks]).tolist() == [9, 9, 2]
    for budget in range(1, 82):
        counts = np.bincount(labels[selection.balanced(np.zeros((82, 1)), budget, KEY, labels=labels)],
                             minlength=3)  # fmt: skip
        full = counts == np.bincount(labels)
        assert counts.max() - counts[~full].min(initial=counts.max()) <= 1


def test_by_score_takes_the_highest():
    picks = selection.by_score(FEATURES, 6, KEY, LOSSES)
    assert sorted(picks) == sorted(np.argsort(-LOSSES)[:6])
    assert len({tuple(selection.by_score(FEATURES, 3, jax.random.key(i), np.zeros(20)))
                for i in range(5)}) > 1  # fmt: skip  # ties are broken at random


def test_importance_is_unbiased_and_its_variance_is_the_least():
    """The mean over all draws, weighted by their chance, is the mean; exactly, for B = 1."""
    values = np.array([4.0, -2.0, 0.5, 0.0])
    rng_free = {}
    for i in range(400):
        picks, w = selection.importance(np.zeros((4, 1)), 1, jax.random.key(i), values, share=0.2)
        rng_free[int(picks[0])] = float(w[0])
    p = 0.8 * np.abs(values) / np.abs(values).sum() + 0.2 / 4
    for i, w in rng_free.items():
        np.testing.assert_allclose(w, 1 / (4 * p[i]), rtol=1e-6)
    assert set(rng_free) == {0, 1, 2, 3}
    assert max(rng_free.values()) <= 1 / 0.2 + 1e-6
    np.testing.assert_allclose(sum(p[i] * rng_free[i] * values[i] for i in range(4)), values.mean())
    second = lambda p: ((values / 4) ** 2 / p).sum()  # noqa: E731  # E[(w x)^2]
    best = np.abs(values[:3]) / np.abs(values).sum()
    other = np.random.default_rng(0).dirichlet(np.ones(3), 200)
    values = values[:3]
    assert all(second(best) <= second(q) + 1e-9 for q in other)


def test_importance_draws_in_proportion():
    weights = np.array([1.0, 3.0, 0.0, 6.0])
    picks = [selection.importance(np.zeros((4, 1)), 4, jax.random.key(i), weights, share=0.0)[0]
             for i in range(400)]  # fmt: skip
    found = np.bincount(np.concatenate(picks), minlength=4) / 1600
    np.testing.assert_allclose(found, weights / 10, atol=0.04)
    nothing, w = selection.importance(np.zeros((4, 1)), 4, KEY, np.zeros(4))
    assert nothing.shape == (4,)
    np.testing.assert_allclose(w, 1.0, rtol=1e-6)


TINY = st.integers(0, 10_000)


@settings(max_examples=25, deadline=None)
@given(TINY)
def test_k_center_is_at_most_twice_the_best_cover(seed):
    x = np.random.default_rng(seed).normal(size=(8, 2))
    radius = lambda picks: np.sqrt(cover.distances(x, x[list(picks)]).min(1).max())  # noqa: E731
    found = radius(selection.k_center(x, 3, jax.random.key(seed)))
    best = min(radius(picks) for picks in itertools.combinations(range(8), 3))
    assert best - 1e-6 <= found <= 2 * best + 1e-6


def test_k_center_is_gonzalez():
    """The published greedy loop, by hand; the first picks do not depend on the budget."""
    picks = selection.k_center(FEATURES, 10, KEY).tolist()
    x, taken = FEATURES.astype(np.float64), picks[:1]
    while len(taken) < 10:
        away = [min(np.linalg.norm(x[i] - x[j]) for j in taken) for i in range(20)]
        taken.append(int(np.argmax(away)))
    assert picks == taken
    assert selection.k_center(FEATURES, 4, KEY).tolist() == picks[:4]


def test_k_center_follows_its_examples_when_they_are_reordered():
    order = np.random.default_rng(5).permutation(20)
    moved = np.empty(20, int)
    moved[order] = np.arange(20)  # where each example is now
    first = selection.k_center(FEATURES, 6, KEY)
    # The first one is drawn by its place: begin with the same example in both orders.
    begin = first[0]
    swap = np.arange(20)
    swap[[begin, moved[begin]]] = swap[[moved[begin], begin]]
    order = order[swap]
    again = order[selection.k_center(FEATURES[order], 6, KEY)]
    assert again.tolist() == first.tolist()


def test_weights_of_k_center_draw_it_towards_what_counts():
    x, weights = np.array([[0.0], [1.0], [-1.01]]), np.array([1.0, 9.0, 0.1])
    key = next(k for k in map(jax.random.key, range(50))
               if selection.k_center(x, 1, k)[0] == 0)  # fmt: skip
    assert selection.k_center(x, 2, key).tolist() == [0, 2]
    assert selection.k_center(x, 2, key, weights).tolist() == [0, 1]


@settings(max_examples=8, deadline=None)
@given(TINY)
def test_k_means_ends_in_a_local_optimum(seed):
    """Each center is the mean of what is nearest to it, so no single move helps."""
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(7, 2)), rng.gamma(1.0, size=7) + 0.01
    cost = lambda c: (cover.distances(x, c).min(1) * weights).sum()  # noqa: E731
    start = x[:3]
    found = cover.lloyd(x, start, weights)
    near = np.argmin(cover.distances(x, found), 1)
    for k in set(near.tolist()):
        mean = np.average(x[near == k], axis=0, weights=weights[near == k])
        np.testing.assert_allclose(found[k], mean, atol=1e-12)
    best = np.inf
    for groups in itertools.product(range(3), repeat=7):  # exhaustive: 3^7 partitions
        if len(set(groups)) == 3 and not groups[0]:
            own = np.eye(3)[list(groups)].T * weights
            best = min(best, cost(own @ x / own.sum(1, keepdims=True)))
    assert best - 1e-9 <= cost(found) <= cost(start) + 1e-12


def transcribed(theta, f, w, tau, beta, kind):
    """The loss of ActiveFT_CIFAR.py as vecaf.md has it, with VeCAF's weights; and its slope."""
    norm = np.linalg.norm(theta, axis=1, keepdims=True)
    c = theta / norm
    s = f @ c.T
    near = s.argmax(1)
    r = np.exp(c @ c.T / tau).sum(0)  # sum over k' of exp(sg(c_k') c_k / tau)
    top, rest = np.exp(s[np.arange(len(f)), near] / tau), beta * r[near]
    if kind == "published":
        top, p = w * top, np.full(len(f), 1 / len(f))
    else:
        p = w / w.sum()
    cost = -(p * np.log(top / (top + rest))).sum()
    push = p * rest / (top + rest) / tau  # of d log rest - d log top
    slope = np.zeros_like(c)
    for i, k in enumerate(near):
        share = np.exp(c @ c[k] / tau)  # only c_k moves, the others are behind the stop
        slope[k] += push[i] * ((share @ c) / share.sum() - f[i])
    return cost, (slope - (slope * c).sum(1, keepdims=True) * c) / norm


@pytest.mark.parametrize("kind", ["weighted", "published"])
def test_objective_and_adam_are_the_published_ones(kind):
    """Cost and slope in float64 NumPy; then centers after steps of a transcribed Adam."""
    f = centers.unit(FEATURES.astype(np.float64))
    theta, w = f[:4].copy() * np.array([[1.0], [2.0], [0.5], [1.0]]), LOSSES + 0.1
    args = (jnp.asarray(f, jnp.float32), jnp.asarray(w, jnp.float32), jnp.ones(4, bool))
    value, slope = SLOPE(jnp.asarray(theta, jnp.float32), *args, 0.07, 1.5, kind)
    cost, wanted = transcribed(theta, f, w, 0.07, 1.5, kind)
    np.testing.assert_allclose(value, cost, rtol=1e-5)
    np.testing.assert_allclose(slope, wanted, rtol=1e-3, atol=1e-4)

    found = centers.centroids(
        f, theta[None], w, kind=kind, balance=1.5, steps=3, learning_rate=0.01
    )[0]
    m = v = np.zeros_like(theta)
    for t in range(1, 4):
        g = transcribed(theta, f, w, 0.07, 1.5, kind)[1]
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(found, theta, atol=1e-4)


def test_a_larger_loss_pulls_more_and_as_published_less():
    """The sign that the published code has wrong, see docs/selection.md."""
    f = np.eye(4)[:2].astype(np.float32)
    theta = jnp.asarray([[1.0, 0.9, 0.3, 0.0]])

    def pull(weight, kind):
        weights = jnp.asarray([weight, 1.0])
        slope = SLOPE(theta, f, weights, jnp.ones(1, bool), 0.5, 1.0, kind)[1]
        return float(slope[0, 1] - slope[0, 0])

    ours = [pull(w, "weighted") for w in (0.1, 1.0, 5.0)]
    theirs = [pull(w, "published") for w in (0.1, 1.0, 5.0)]
    assert ours == sorted(ours) and theirs == sorted(theirs, reverse=True)


def test_active_ft_is_vecaf_of_equal_losses_and_lowers_the_objective():
    x = centers.unit(FEATURES)
    picks = selection.active_ft(FEATURES, 5, KEY)
    np.testing.assert_array_equal(picks, selection.vecaf(FEATURES, 5, KEY, np.full(20, 7.0)))
    start = x[:5]
    found = centers.centroids(x, start[None], np.ones(20))[0]
    value = lambda c: float(centers.objective(jnp.asarray(c), x, jnp.ones(20), jnp.ones(5, bool)))  # noqa: E731
    assert value(found) < value(start)


def test_what_fills_up_changes_no_center():
    """Rooms of 64 and 128 examples, and of 8 and 16 centers, give the same centers."""
    x = centers.unit(np.random.default_rng(2).normal(size=(70, 5)).astype(np.float32))
    w = np.where(np.arange(70) < 60, 1.0, 0.0)  # so the last ten do not count either
    both = [centers.centroids(x[:n], x[None, :8], w[:n], steps=20)[0] for n in (60, 70)]
    np.testing.assert_allclose(*both, atol=2e-5)
    small = SLOPE(x[:8], x[:60], jnp.ones(60), jnp.ones(8, bool))
    filled = np.concatenate([x[:8], np.eye(5, dtype=np.float32)])
    large = SLOPE(filled, x[:60], jnp.ones(60), jnp.arange(13) < 8)
    np.testing.assert_allclose(small[0], large[0], rtol=1e-6)
    np.testing.assert_allclose(small[1], large[1][:8], atol=1e-5)
    np.testing.assert_array_equal(large[1][8:], 0)


@pytest.mark.parametrize("name", ["active_ft", "vecaf", "vecaf, 4"])
@pytest.mark.parametrize("zeros", [1, 6, 17, 20])
def test_features_without_a_direction_spoil_no_pick(name, zeros):
    """One center of zeros made all centers no numbers, and the picks 0, 1, 2, ..."""
    x = np.array(FEATURES)
    x[:zeros] = 0
    for seed in range(5):
        picks = SELECTORS[name](x, 5, jax.random.key(seed)).tolist()
        assert len(set(picks)) == 5 and len([i for i in picks if i >= zeros]) >= 3 * (zeros < 16)
    with pytest.raises(ValueError, match="out of the finite numbers"):
        centers.centroids(centers.unit(x), x[None, :5], np.ones(20), temperature=1e-38, steps=3)


def test_vecaf_finds_what_has_loss():
    """Two clusters, one learned already: the other gets the budget."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal([5, 0, 0], 1, (100, 3)), rng.normal([0, 0, 5], 1, (100, 3))])
    losses = np.where(np.arange(200) < 100, 0.01, 3.0)
    ours = selection.vecaf(x, 10, KEY, losses)
    plain = selection.active_ft(x, 10, KEY)
    assert (ours >= 100).sum() >= 9 and 2 <= (plain >= 100).sum() <= 8


def test_ensemble_is_the_published_formula():
    sets = np.random.default_rng(4).normal(size=(5, 6, 3))
    rest = sets[1:]
    mean = rest.mean(0)
    sigma = sum(c.T @ c for c in rest) / 4 - mean.T @ mean
    g = rest[0]
    wanted = g + (g - mean) * ((g - mean) @ np.linalg.inv(sigma))
    np.testing.assert_allclose(centers.joined(sets), wanted)
    np.testing.assert_array_equal(centers.joined(sets[:2]), sets[1])
    np.testing.assert_array_equal(centers.joined(sets[:1]), sets[0])


def test_scores_by_hand():
    logits, labels = np.random.default_rng(0).normal(size=(6, 4)) * 3, np.array([0, 1, 2, 3, 0, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    top = np.sort(p, 1)
    wanted = {
        "loss": -np.log(p[np.arange(6), labels]),
        "entropy": -(p * np.log(p)).sum(1),
        "margin": top[:, -2] - top[:, -1],
        "el2n": np.sqrt(((p - np.eye(4)[labels]) ** 2).sum(1)),
    }
    found = selection.scores(logits, labels)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-5, atol=1e-6)


def test_augment_is_the_published_formula():
    rng = np.random.default_rng(0)
    e, t = rng.normal(size=(2, 7, 4))
    # The published softmax is over one number, so that alpha is 1: e_aug = 1.2 t - 0.2 e.
    np.testing.assert_allclose(
        selection.augment(e, t, 1.2, "one"), 1.2 * t - 0.2 * e, rtol=1e-5, atol=1e-6
    )
    away = np.exp(np.linalg.norm(e - t, axis=1))
    alpha = 7 * away / away.sum()
    wanted = e - 0.3 * alpha[:, None] * (e - t)
    np.testing.assert_allclose(selection.augment(e, t, 0.3), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(selection.augment(e, t, 0.0), e.astype(np.float32))
    with pytest.raises(ValueError, match="texts: expected finite numbers, as many as features"):
        selection.augment(e, t[:3], 0.3)
