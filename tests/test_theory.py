"""The theory's claim on a quadratic with known curvature, and the figures as found."""

import numpy as np
import pytest

from experiments import quadratic


@pytest.mark.slow
def test_curvature_helps_on_a_quadratic():
    """The true curvature needs far fewer rounds; the learned one no more than tuned DeComFL."""
    results = quadratic.compare(dimension=60, rounds=1200, seeds=3)
    s = quadratic.curvature(60)
    plain, learned, true = results.values()
    assert s.sum() / s.max() < 3  # low effective rank
    assert np.isclose(plain["zeta"], s.sum()) and np.isclose(true["zeta"], 60, rtol=1e-4)
    assert true["rounds"] < plain["rounds"] / 3
    assert learned["rounds"] < plain["rounds"]
    print(results)
