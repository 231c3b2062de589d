"""Directions of several upper parts in one round, as a job has them."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from hiso_jax import split
from hiso_jax.algorithm import algorithm
from hiso_jax.train import digits, job, methods, settings
from tests.helpers import assert_same_bits


def test_a_job_has_several_depths(tmp_path: Any):
    """Each cut starts from what the deeper one kept, and keeps what it would from the batch."""
    options = digits.Options(
        num_perturbations=7, upper_directions=(2, 3), upper_layers=(2, 1), out=tmp_path
    )
    settings.check(options)
    problem = digits.digits(8)
    alg = job.algorithm(options, problem, 0.1)
    state = alg.init(problem.params, jax.random.key(0))
    batches = problem.clients.batches(problem.clients.names[:2], 0, 4)
    whole = methods._upper(options, problem)
    assert whole[0].between is None and whole[1].between is not None
    batch = jax.tree.map(lambda x: x[0, 0], batches)
    kept = whole[0].trunk(problem.params, batch)
    assert_same_bits(
        jax.jit(whole[1].between)(problem.params, kept),
        jax.jit(whole[1].trunk)(problem.params, batch),
    )
    anew = [cut._replace(between=None) for cut in whole]
    plain = algorithm(alg.spec._replace(estimator=split.estimator(anew, 7, 1e-3)))
    scalars = [jax.jit(a.probe)(state, batches) for a in (alg, plain)]
    np.testing.assert_allclose(scalars[0], scalars[1], rtol=1e-3, atol=1e-3)
    shares = methods.shares(options, problem)
    assert 1 > shares[0] > shares[1] > 0
    cost = 1 + 2 + 2 * shares[0] + 3 * shares[1] + shares[0] - shares[1]
    np.testing.assert_allclose(methods.forward_passes(alg, shares), cost)
    for other, message in [
        (dict(upper_layers=(1, 2)), "the deepest first"), (dict(upper_layers=(1,)), "expected 2, as many"),
        (dict(upper_directions=(4, 4)), "expected at most --num-perturbations 7"),
        (dict(upper_directions=(4, 0)), "--upper-directions: expected"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            settings.check(dataclasses.replace(options, **other))  # type: ignore
