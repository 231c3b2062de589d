"""The docstring task and the way a job splits it."""

import collections

import numpy as np
import pytest

from hiso_jax.tasks import docstrings
from hiso_jax.tasks.splits import dirichlet, dirichlet_draws, train_dev_test


def test_docstrings(monkeypatch: pytest.MonkeyPatch):
    examples = docstrings.load()
    some = {"networking": docstrings.TOPICS["networking"][:4]}
    monkeypatch.setattr(docstrings, "TOPICS", some)
    again = docstrings.load()
    assert len(again) > 100 and again == examples[: len(again)]  # a fixed order
    monkeypatch.undo()
    texts = [e.text for e in examples]
    assert len(set(texts)) == len(texts) > 2500
    assert all(len(t.split()) >= 5 and "\n" not in t for t in texts)
    by_client = collections.defaultdict(set)
    for e in examples:
        by_client[e.client].add(e.label)
    assert 60 <= len(by_client) <= 80
    assert all(len(labels) == 1 for labels in by_client.values())  # non-IID: one topic a client
    assert {e.label for e in examples} == set(range(len(docstrings.TOPICS)))
    assert len(docstrings.LABEL_SENTENCES) == len(docstrings.TOPICS)


def test_split_is_a_partition():
    parts = train_dev_test(1000, seed=0)
    assert [len(p) for p in parts] == [700, 150, 150]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(
        np.array_equal(a, b) for a, b in zip(parts, train_dev_test(1000, seed=0), strict=True)
    )


def test_two_laws_of_unequal_labels():
    """Both give every example to one client; only draws leave clients without, or take infinity."""
    labels = np.random.default_rng(0).integers(4, size=3000)
    for parts in (dirichlet(labels, 30, 0.1), dirichlet_draws(labels, 30, 0.1)):
        assert len(parts) == 30
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(3000))
    assert min(map(len, dirichlet(labels[:60], 50, 0.01))) >= 1
    assert min(map(len, dirichlet_draws(labels[:60], 50, 0.01))) == 0
    # Equal shares: counts are multinomial around the mean, not equal to it.
    sizes = np.array(list(map(len, dirichlet_draws(labels, 30, np.inf))))
    assert sizes.std() > 3 and abs(sizes - 100).max() < 60


@pytest.mark.parametrize("alpha", [0.5, np.inf])
def test_unequal_labels_and_sizes(alpha: float):
    """Sizes are log-normal around the mean that they have without; labels as alpha says."""
    labels = np.random.default_rng(0).integers(4, size=40_000)
    parts = dirichlet_draws(labels, 200, alpha, spread=1.5)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(40_000))
    logs = np.log([len(part) for part in parts if len(part)])
    assert logs.std() == pytest.approx(1.5, rel=0.2)
    large = max(parts, key=len)
    shares = np.bincount(labels[large], minlength=4) / len(large)
    assert (abs(shares - 0.25).max() < 0.05) == np.isinf(alpha)
    with pytest.raises(ValueError, match=r"spread.*-1"):
        dirichlet_draws(labels, 200, alpha, spread=-1.0)
