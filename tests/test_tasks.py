"""The docstring task and the way a job splits it."""

import collections

import numpy as np

from experiments.problem import split
from hiso_jax.tasks import docstrings


def test_docstrings():
    examples = docstrings.load()
    assert examples == docstrings.load()  # a fixed order
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
    parts = split(1000, seed=0)
    assert [len(p) for p in parts] == [700, 150, 150]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(1000, seed=0), strict=True))
