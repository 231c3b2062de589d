"""Directions of several upper parts in one round, as a job has them."""

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from hiso_jax import split
from hiso_jax._engine import trees
from hiso_jax.algorithm import algorithm
from hiso_jax.train import depth, digits, job, methods, settings
from tests.helpers import assert_same_bits

pytestmark = pytest.mark.usefixtures("no_pictures")


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


class TestAuto:
    """`--upper-directions auto`."""

    @hypothesis.given(st.integers(1, 200), st.floats(1e-4, depth.DEAREST))
    def test_never_more_work_than_whole_directions(self, work: int, share: float):
        wholes, upper = depth.divide(work, share)
        assert wholes >= 1 and 0 <= upper <= depth.MOST * work
        assert wholes + upper * share <= max(work, 1) + 1e-6
        # Nothing is left over that another direction of everything would fit in.
        assert work - wholes - upper * share < 1

    def test_a_look_sees_what_a_layer_holds(self):
        """Squares of scalars along masked noise are those of the gradient's part, in the mean."""
        problem = digits.digits(8)
        options = digits.Options(clients_per_round=4, smoothing=1e-2)
        (found,) = depth.look(options, problem)
        names = problem.clients.sample(4, 0, 0, "uniform")
        batches = problem.clients.batches(names, 0, options.batch_size)
        square, gradient = {True: 0.0, False: 0.0}, jax.jit(jax.grad(problem.loss_fn))
        for c in range(4):
            own = jax.tree.map(lambda x, c=c: x[c, 0], batches)
            slope = trees.named(gradient(problem.params, own))
            for name, x in slope.items():
                square[name in problem.upper(1).leaves] += float((x**2).sum()) / 4  # type: ignore
        assert found.layers == 1 and 0 < found.share < 0.1
        # Sixteen directions: 1 / sqrt(8) of scatter.
        assert found.square == pytest.approx(square[True], rel=0.7)
        assert found.held == pytest.approx(square[True] / sum(square.values()), rel=0.5)

    def test_a_job_looks_once(self, tmp_path: Any, capsys: pytest.CaptureFixture[str]):
        """The numbers are the run's options: one that goes on takes them and does not look again."""
        problem = digits.digits(8)
        options = digits.Options(
            method="rms",
            upper_directions="auto",
            rounds=2,
            num_perturbations=2,
            out=tmp_path / "run",
        )
        job.run(options, problem, {"rms": 0.1})
        assert "of a pass" in capsys.readouterr().out
        kept = settings.read(tmp_path / "run")["options"]
        assert kept["upper_layers"] == [1] and kept["num_perturbations"] == 1 + 8
        assert kept["upper_directions"] == [8]
        again = settings.settle(digits.Options(resume=tmp_path / "run"))
        assert again.upper_directions == (8,)
        job.run(again, problem, {})
        assert "of a pass" not in capsys.readouterr().out
        alg = job.algorithm(again, problem, 0.1)
        assert methods.forward_passes(alg, methods.shares(again, problem)) <= 2 + 1

    def test_not_where_it_is_of_no_use(self, tmp_path: Any):
        problem = digits.digits(8)
        options = digits.Options(upper_directions="auto", out=tmp_path)
        with pytest.raises(ValueError, match="auto goes with --estimator forward"):
            settings.check(dataclasses.replace(options, estimator="central"))
        with pytest.raises(ValueError, match="--upper-directions: .* has no upper part"):
            depth.settle(options, problem._replace(upper=None))
        first_order = dataclasses.replace(options, method="fedadam")
        assert depth.settle(first_order, problem._replace(upper=None)).upper_directions == ()
        # All of the gradient lies below the cut: nothing is to be learned above it.
        cut = lambda layers, before=None: problem.upper(layers)._replace(  # type: ignore  # noqa: E731
            head=lambda params, kept: kept["stream"].mean()
        )
        assert depth.settle(options, problem._replace(upper=cut)).upper_directions == ()
