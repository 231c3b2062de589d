"""Bad input: an error at the door that names the argument, what was given and what is wanted."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import privacy
from hiso_jax._engine import files
from tests.helpers import assert_same_bits, quadratic_loss, refuse_with

PARAMS = {"w": jnp.zeros(3)}
BATCHES = jnp.ones((2, 1, 3))


def algorithm(**options: Any) -> hj.Algorithm:
    return hj.federated_hiso(options.pop("loss_fn", quadratic_loss), 0.1, **options)


@pytest.mark.parametrize("options, error, text", [
    (dict(num_perturbations=0), ValueError, "num_perturbations: .* >= 1, got 0"),
    (dict(num_perturbations=2.5), TypeError, "num_perturbations: .* got 2.5"),
    (dict(local_steps=-1), ValueError, "local_steps: .* got -1"),
    (dict(smoothing=0), ValueError, "smoothing: .* > 0, got 0"),
    (dict(smoothing=-1e-3), ValueError, "smoothing: .* got -0.001"),
    (dict(smoothing=float("nan")), ValueError, "smoothing: .* got nan"),
    (dict(decay=1.5), ValueError, "decay: .* <= 1, got 1.5"),
    (dict(decay=-0.1), ValueError, "decay: .* got -0.1"),
    (dict(epsilon=-1), ValueError, "epsilon: .* got -1"),
    (dict(update_steps="first"), ValueError, "update_steps: .*'last', 'all'.* got 'first'"),
    (dict(distribution="cauchy"), ValueError, "distribution: .*got 'cauchy'"),
    (dict(estimator="backward"), ValueError, "estimator: .*'forward', 'central'.*'backward'"),
    (dict(nonfinite="ignore"), ValueError, "nonfinite: .*'raise', 'exclude'.*'ignore'"),
    (dict(loss_fn=3), TypeError, "loss_fn: .* got 3"),
])  # fmt: skip
def test_options(options: dict[str, Any], error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        algorithm(**options)


@pytest.mark.parametrize("rate", [-0.1, float("inf"), "fast", None])
def test_learning_rate(rate: Any):
    with pytest.raises((TypeError, ValueError), match="learning_rate: "):
        hj.decomfl(quadratic_loss, rate)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("batches, text", [
    (jnp.ones((2, 3)), r"leading axes \[C, K\]"), (jnp.ones(2), "leading axes"),
    (jnp.ones((2, 2, 3)), "1 local steps"), ({}, "leading axes"),
    ({"a": jnp.ones((2, 1, 3)), "b": jnp.ones((3, 1, 3))}, "the same C"),
    (jnp.ones((0, 1, 3)), "at least one client"),
])  # fmt: skip
def test_batches(batches: Any, text: str, jit: bool):
    alg = algorithm()
    probe = jax.jit(alg.probe) if jit else alg.probe
    with pytest.raises(ValueError, match=f"batches: .*{text}"):
        probe(alg.init(PARAMS, jax.random.key(0)), batches)


@pytest.mark.parametrize("loss_fn, error, text", [
    (lambda p, b: p["w"] - b, ValueError, r"scalar loss of shape \(\), got \(3,\)"),
    (lambda p, b: quadratic_loss(p, b).astype(jnp.bfloat16), TypeError, "float32 loss, got bfloat16"),
    (lambda p, b: jnp.int32(1), TypeError, "float32 loss, got int32"),
    (lambda p, b: (quadratic_loss(p, b), 1), ValueError, "scalar loss"),
])  # fmt: skip
def test_loss(loss_fn: Any, error: type[Exception], text: str):
    alg = algorithm(loss_fn=loss_fn)
    with pytest.raises(error, match=f"loss_fn: .*{text}"):
        alg.probe(alg.init(PARAMS, jax.random.key(0)), BATCHES)


def test_record():
    alg = algorithm()
    state = alg.init(PARAMS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"record: expected shape \(1, 5\).* got \(5,\)"):
        alg.advance(state, jnp.ones(5))
    with pytest.raises(ValueError, match="record: expected finite scalars"):
        alg.advance(state, jnp.full((1, 5), jnp.nan).at[0, 2].set(1.0))
    with pytest.raises(ValueError, match=r"records: expected shape \[R, 1, 5\].* got \(1, 5\)"):
        alg.replay(state, jnp.ones((1, 5)))
    records = np.ones((4, 1, 5))
    records[2, 0, 3] = np.inf
    with pytest.raises(ValueError, match=r"records: NaN or infinite scalars in records \[2\]"):
        alg.replay(state, records)
    for rate in (jnp.nan, jnp.inf, -1):
        with pytest.raises(ValueError, match="learning_rates: expected finite numbers >= 0"):
            alg.replay(state, jnp.ones((2, 1, 5)), jnp.array([0.1, rate]))


@pytest.mark.parametrize("weights, text", [
    ([1.0, -1.0], "-1"), ([0.0, 0.0], "sum > 0"), ([1.0], r"expected shape \(2,\)"),
    ([1.0, float("nan")], "nan"),
])  # fmt: skip
def test_weights(weights: list[float], text: str):
    with pytest.raises(ValueError, match=f"weights: .*{text}"):
        algorithm().aggregate(jnp.ones((2, 1, 5)), jnp.array(weights))


def test_scalars_shape():
    with pytest.raises(ValueError, match=r"scalars: expected shape \[C, 1, 5\]"):
        algorithm().aggregate(jnp.ones((2, 5)))


SCALARS = np.array([[[1.0, 2.0]], [[np.nan, 2.0]], [[3.0, 4.0]]], np.float32)


def test_a_clients_nan_is_named():
    alg = algorithm(num_perturbations=2)
    with pytest.raises(ValueError, match=r"clients \[1\] .*sent NaN"):
        alg.aggregate(SCALARS)


def test_a_clients_nan_is_excluded_when_asked():
    alg = algorithm(num_perturbations=2, nonfinite="exclude")
    np.testing.assert_allclose(alg.aggregate(SCALARS), [[2.0, 3.0]])
    np.testing.assert_allclose(alg.aggregate(SCALARS, jnp.array([3.0, 9.0, 1.0])), [[1.5, 2.5]])


@pytest.mark.parametrize("nonfinite", ["raise", "exclude"])
def test_a_clients_nan_under_jit(nonfinite: str):
    """Nothing can be raised inside jit: the round moves nothing, or goes on without the client."""
    nan_for = lambda p, b: jnp.where(b.mean() > 5, jnp.nan, quadratic_loss(p, b))  # noqa: E731
    alg = algorithm(loss_fn=nan_for, nonfinite=nonfinite)
    state = alg.init(PARAMS, jax.random.key(0))
    batches = BATCHES.at[1].set(10.0)
    end, metrics = jax.jit(alg.round)(state, batches)
    assert metrics.finite.tolist() == [True, False]
    assert int(end.round) == 1
    if nonfinite == "raise":
        assert bool(jnp.isnan(metrics.record).all())
        assert_same_bits((end.params, end.rule), (state.params, state.rule))
    else:
        only, _ = jax.jit(alg.round)(state, batches[:1])
        np.testing.assert_allclose(end.params["w"], only.params["w"], rtol=1e-5)
        assert bool(jnp.isfinite(metrics.loss))
    # A client of weight 0 is absent, whatever it sends.
    _, metrics = jax.jit(alg.round)(state, batches, jnp.array([1.0, 0.0]))
    assert bool(jnp.isfinite(metrics.record).all())


def test_nobody_left():
    alg = algorithm(nonfinite="exclude")
    state = alg.init(PARAMS, jax.random.key(0))
    end, metrics = jax.jit(alg.round)(state, jnp.full((2, 1, 3), jnp.nan))
    assert bool(jnp.isnan(metrics.record).all())
    assert_same_bits((end.params, end.rule), (state.params, state.rule))


def write(path: Path) -> None:
    with files.atomic_write(path) as part:
        part.write_text("all")


@pytest.mark.parametrize("call, number, fatal", [
    *[("chmod", n, False) for n in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EIO)],
    *[("fsync", n, False) for n in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)],
    *[("fsync", n, True) for n in (errno.ENOSPC, errno.EIO, errno.EDQUOT)],
    *[("replace", n, True) for n in (errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.ENOSPC)],
])  # fmt: skip
def test_file_systems_that_cannot_do_something(
    call: str, number: int, fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is a courtesy may fail; else the error says so, and all is as it was."""
    target = tmp_path / "y.txt"
    target.write_text("before")
    monkeypatch.setattr(os, call, refuse_with(number))
    if not fatal:
        write(target)
    else:
        with pytest.raises(OSError) as caught:
            write(target)
        assert caught.value.errno == number
        if call == "replace":
            assert str(target) in str(caught.value) and "does not rename" in str(caught.value)
    assert target.read_text() == ("before" if fatal else "all")
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_in_its_place_is_there_after_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files are synced before they are renamed, and their folder after it."""
    real, seen = os.fsync, list[tuple[str, bool]]()

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((path.name, target.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    target = tmp_path / "a.txt"
    write(target)
    assert [done for _, done in seen] == [False, True] and seen[-1][0] == tmp_path.name
    seen.clear()
    target = tmp_path / "folder"
    with files.whole_folder(target) as part:
        (part / "in.it").mkdir()
        (part / "in.it" / "a.txt").write_text("all")
    assert seen == [("a.txt", False), (tmp_path.name, True)]
    seen.clear()
    target = tmp_path / "secret"
    privacy.secret(target)
    assert [done for _, done in seen] == [False, True] and seen[-1][0] == tmp_path.name


KILLED = """
import contextlib, os, pathlib, signal, sys
from hiso_jax._engine import files
folder, stack = pathlib.Path(sys.argv[1]), contextlib.ExitStack()
for write in (files.atomic_write, files.whole_folder):
    for name in ("a.txt", "b.txt"):
        part = stack.enter_context(write(folder / write.__name__ / name))
        (part / "x" if part.is_dir() else part).write_text("half of i")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_with_the_next_of_its_name(tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    one, other = tmp_path / "atomic_write", tmp_path / "whole_folder"
    assert len(list(one.iterdir())) == len(list(other.iterdir())) == 2
    kept = other / ".a.txt-settings"  # as long as what is random, and somebody's own
    kept.mkdir()
    with files.atomic_write(one / "a.txt", sweeps=True) as part:
        young = one / ".a-part-abcdefgh.txt"
        young.write_text("another writer's, who is still at it")
        os.utime(young, ns=(part.stat().st_mtime_ns + 1,) * 2)
    with files.whole_folder(other / "a.txt"):
        pass
    assert {p.name[:7] for p in one.iterdir()} == {"a.txt", ".a-part", ".b-part"}
    assert young.exists() and kept.exists()
    assert {p.name[:7] for p in other.iterdir()} == {"a.txt", ".a.txt-", ".b.txt-"}
    write(one / "b.txt")  # where two may write at once, nothing is taken away
    assert len([p for p in one.iterdir() if p.name.startswith(".b-part")]) == 1


def test_files_in_the_place_of_folders_and_long_names(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match=f"folder.*{tmp_path}"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    longest = tmp_path / ("n" * 251 + ".txt")
    write(longest)
    assert longest.read_text() == "all"
