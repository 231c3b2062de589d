"""Lanczos quadrature against eigenvalues that are known, and the looks of `experiments.spectrum`."""

import doctest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hiso_jax as hj
from experiments import blocks, lanczos, spectrum
from hiso_jax import federation
from hiso_jax._engine import trees
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import rows
from tests.helpers import PROBLEMS


def normal(*shape: int) -> np.ndarray:
    """The same numbers whichever tests were run before."""
    return np.random.default_rng(0).normal(size=shape)


def matrix(values: Any, dtype: Any = np.float64) -> np.ndarray:
    """A symmetric matrix with these eigenvalues."""
    turn, _ = np.linalg.qr(normal(len(values), len(values)))
    return ((turn * np.asarray(values, float)) @ turn.T).astype(dtype)


def times(a: np.ndarray) -> lanczos.Product:
    return lambda x: a @ x


LOW = np.concatenate([[50.0, 20, -8, 5], normal(196) / 20])
"""Four large eigenvalues of 200."""


def test_docstrings():
    for module in (lanczos, spectrum):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_a_quadrature_is_exact_up_to_degree_2k_minus_1(steps):
    a = matrix(normal(40))
    values, vectors = np.linalg.eigh(a)
    start = normal(40)
    weights = (vectors.T @ start) ** 2 / (start @ start)
    found, _ = lanczos.lanczos(times(a), start, steps).ritz()
    assert len(found.nodes) == steps and found.weights.sum() == pytest.approx(1)
    moments = lambda d: (found.weights @ found.nodes**d, weights @ values**d)  # noqa: E731
    for degree in range(2 * steps):
        np.testing.assert_allclose(*moments(degree), atol=1e-10 * np.abs(values).max() ** degree)
    ours, theirs = moments(2 * steps)
    assert ours < theirs  # Gauss's remainder has the sign of the next even derivative


def test_the_basis_stays_orthogonal_and_errors_hold():
    """Also where Lanczos without reorthogonalization finds the largest eigenvalue again and again."""
    a = matrix(np.append(np.linspace(0, 1, 99), 100.0))
    run = lanczos.lanczos(times(a), normal(100), 60)
    np.testing.assert_allclose(run.basis @ run.basis.T, np.eye(60), atol=1e-13)
    found, _ = run.ritz()
    off = np.abs(found.nodes[:, None] - np.linalg.eigvalsh(a)).min(1)
    assert (off <= found.errors + 1e-12).all() and (found.nodes > 50).sum() == 1


@pytest.mark.slow
@pytest.mark.ci
def test_orthogonal_to_what_is_known():
    """What is left is the matrix without the eigenvectors that are given."""
    a = matrix(LOW)
    values, vectors = np.linalg.eigh(a)
    own = vectors[:, np.abs(values) > 1].T
    run = lanczos.lanczos(times(a), normal(200), 30, own)
    assert np.abs(run.basis @ own.T).max() < 1e-13
    rest = np.abs(values[np.abs(values) < 1]).max()
    assert np.abs(run.ritz()[0].nodes).max() <= rest + 1e-12
    with pytest.raises(ValueError, match="outside of the span"):
        lanczos.lanczos(times(a), own.sum(0), 3, own)
    whole = lanczos.lanczos(times(a), normal(200), 500, own)  # there is no more than that
    np.testing.assert_allclose(
        whole.ritz()[0].nodes, np.sort(values[np.abs(values) < 1]), atol=1e-9
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_eigh(dtype):
    a = matrix(LOW, dtype)
    found = lanczos.spectrum(times(a), 200, search=16, steps=30, probes=8, dtype=dtype)
    ours, exact = lanczos.figures(found), lanczos.figures(lanczos.exactly(a))
    np.testing.assert_allclose(found.values, [50, 20, -8, 5], rtol=1e-5)
    assert exact["trace"] == pytest.approx(np.trace(a), rel=1e-5)
    assert exact["rank"] == pytest.approx(np.abs(LOW).sum() / 50, rel=1e-5)
    for name in ("trace", "absolute"):
        assert abs(ours[name] - exact[name]) < 5 * ours[f"{name}_error"] + 0.01 * exact[name], name
    for name in ("largest", "least", "rank", "negative"):
        assert ours[name] == pytest.approx(exact[name], rel=0.05), name
    assert ours["half"] == pytest.approx(exact["half"], rel=0.05)
    assert exact["half"] == pytest.approx(np.abs(LOW).sum() / 2 / 50, rel=1e-5)  # of the first
    assert found.all().weights.sum() == pytest.approx(200)


def test_the_mean_over_probes_is_the_trace():
    """Without a bias, and as far off as the standard error says; known eigenvalues calm it."""
    a = matrix(LOW)
    errors = {}
    for search in (1, 16):
        draws = [
            lanczos.spectrum(times(a), 200, search=search, steps=2, probes=4, seed=s,
                             dtype=np.float64).total(lambda x: x)
            for s in range(60)
        ]  # fmt: skip
        means, errors[search] = np.array(draws).T
        assert abs(means.mean() - np.trace(a)) < 4 * means.std() / np.sqrt(60)
        assert 0.5 < np.median(errors[search]) / means.std() < 1.5
    assert np.median(errors[16]) < np.median(errors[1]) / 20


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_degenerate_matrices(dtype):
    """Where steps end early: nothing, one direction, all alike, two values."""
    x = normal(30)
    x /= np.linalg.norm(x)
    cases = {
        "zero": np.zeros((30, 30)),
        "one direction": -3 * np.outer(x, x),
        "all alike": 2 * np.eye(30),
        "two values": matrix([4.0] * 10 + [-1.0] * 20),
        "a number": np.full((1, 1), 7.0),
    }
    for name, a in cases.items():
        a = a.astype(dtype)
        found = lanczos.spectrum(times(a), len(a), search=8, steps=6, probes=20, dtype=dtype)
        ours, exact = lanczos.figures(found), lanczos.figures(lanczos.exactly(a))
        assert found.all().weights.sum() == pytest.approx(len(a)), name
        for key in ("trace", "absolute", "rank"):
            error = 4 * np.nan_to_num(ours[f"{key}_error"]) + 1e-4  # of a rank of nothing, none
            assert ours[key] == pytest.approx(exact[key], abs=error, nan_ok=True), (name, key)
            assert name == "two values" or not error > 1e-3
        assert ours["largest"] == pytest.approx(exact["largest"], rel=1e-5), name
    run = lanczos.lanczos(times(cases["two values"]), normal(30), 20)
    assert len(run.diagonal) == 2 and run.below[-1] == 0


def test_what_is_not_finite_is_refused():
    with pytest.raises(FloatingPointError, match="product: step 1 is not finite"):
        lanczos.spectrum(lambda x: x * np.nan, 5)
    with pytest.raises(ValueError, match="start"):
        lanczos.lanczos(lambda x: x, np.zeros(4), 2)


def test_counts_and_densities_add_up():
    found = lanczos.exactly(matrix(LOW))
    at = np.logspace(-9, 4, 2601)
    up, down = (side.sum() * 13 / 2600 for side in lanczos.density(found, at, 0.1))
    assert up == pytest.approx((LOW > 0).sum(), rel=1e-3)
    assert down == pytest.approx((LOW < 0).sum(), rel=1e-3)


def network() -> Problem:
    """The small network of the other tests, over clients."""
    data = {"x": normal(64, 3).astype(np.float32), "y": normal(64)}
    data["y"] = data["y"].astype(np.float32)
    loss, params = PROBLEMS["network"]
    unweighted = lambda p, batch: loss(p, {k: batch[k] for k in ("x", "y")})  # noqa: E731
    score = lambda p, batch: {  # noqa: E731
        "loss": unweighted(p, batch), "count": 1.0, "confusion": np.eye(2)
    }  # fmt: skip
    clients = {f"client {i}": {k: v[i::4] for k, v in data.items()} for i in range(4)}
    return Problem("network", params, unweighted, score, federation.Clients(clients), data, data,
                   lambda *_: None)  # fmt: skip


def test_a_network(tmp_path: Path):
    """All its figures are those of its Hessian; whitened too; blocks are parts of the trace."""
    problem = network()
    look = blocks.Derivatives(problem, 64, 16)
    assert len(look.pieces) == 4
    with pytest.raises(ValueError, match="examples: expected at least 65, got 64"):
        blocks.Derivatives(problem, 100, 65)
    alg = hj.federated_hiso(problem.loss_fn, 0.01)
    state = alg.init(problem.params, jax.random.key(0))
    h = {n: jnp.asarray(np.exp(normal(*x.shape)), np.float32)
         for n, x in trees.named(problem.params).items()}  # fmt: skip
    state = state._replace(rule=hj.rules.HisoState(h), round=jnp.int32(1))
    given = spectrum.Spectra(search=16, steps=16, probes=2, whole=True)
    row = spectrum.measured(given, look, state)
    hessian = spectrum.Hessian(look, problem.params)
    size = hessian.size
    assert size == row["parameters"] == 16
    own = lanczos.dense(hessian, size)
    flat, back = ravel_pytree(look.pick(problem.params))
    loss = lambda x: problem.loss_fn(  # noqa: E731
        trees.merge(problem.params, back(x)), problem.dev  # which is that of all clients
    )  # fmt: skip
    np.testing.assert_allclose(own, jax.jit(jax.hessian(loss))(flat), atol=1e-5)
    white = np.concatenate([h[n].ravel() for n in look.pick(problem.params)]) ** -0.5
    for found, a in ((row, own), (row["white"], own * white * white[:, None])):
        exact = lanczos.figures(lanczos.exactly(a))
        for key in ("trace", "absolute", "largest", "rank", "negative"):
            assert found[key] == pytest.approx(exact[key], rel=1e-3), key
            assert found["exact"][key] == pytest.approx(exact[key], rel=1e-3), key
    assert row["white"]["even"] == pytest.approx(row["white"]["absolute"] / (white**2).mean(), 1e-3)
    sides = [np.trace(own[i : i + n, i : i + n]) for i, n in ((0, 4), (4, 12))]
    names = list(row["parts"])
    assert sorted(names) == ["v", "w"]
    np.testing.assert_allclose([row["parts"][n] for n in names], sides, atol=1e-3)
    alone = spectrum.spectrum_of(row)
    assert alone.total(np.abs)[0] == pytest.approx(row["absolute"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.ci
def test_looks_are_kept_and_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The start once for all methods; a method that is added costs its own look only."""
    out, picture, looks = tmp_path / "rows.jsonl", tmp_path / "a.png", []
    own = spectrum.measured

    def counted(*arguments: Any) -> Any:
        looks.append(int(arguments[-1].round))
        return own(*arguments)

    monkeypatch.setattr(spectrum, "measured", counted)
    monkeypatch.setattr(spectrum.compare, "build", lambda *_: network())
    few: dict[str, Any] = dict(examples=64, piece=64, search=3, steps=2, probes=2, out=out,
               vary=("clients_per_round=4", "num_perturbations=2"))  # fmt: skip
    first = spectrum.Spectra(rounds=(0, 2), method=("decomfl",), learning_rate=(0.01,), **few)
    spectrum.main(first)
    assert looks == [0, 2] and len(rows.read(out)) == 2
    both = ("decomfl", "hiso")
    more = spectrum.Spectra(rounds=(0, 2), method=both, learning_rate=(0.01, 0.02), **few)
    spectrum.main(more)
    assert looks == [0, 2, 2] and "white" in rows.read(out)[-1]
    spectrum.main(more)
    spectrum.main(spectrum.Spectra(rounds=(), out=out, picture=picture))
    assert looks == [0, 2, 2] and picture.read_bytes()[:4] == b"\x89PNG"
    words = spectrum.Spectra("llm", vary=('verbalizer=["bad","good"]', "batch_size=2"))
    own: Any = spectrum.settings(words)
    assert own.verbalizer == ("bad", "good") and own.batch_size == 2
    with pytest.raises(
        ValueError, match="--examples: .* multiple of --piece, 64, .* 64 is the next"
    ):
        spectrum.main(spectrum.Spectra(**few | dict(examples=65)))
    with pytest.raises(ValueError, match="--learning-rate: expected 2, one a method, got 1"):
        spectrum.main(spectrum.Spectra(method=both, **few))
    with pytest.raises(ValueError, match="--out: .* has no rows"):
        spectrum.main(spectrum.Spectra(rounds=(), out=tmp_path / "none.jsonl"))
