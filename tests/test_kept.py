"""Nothing that was computed is lost: weights before measurements, any mount, any way of training."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiso_jax import models
from hiso_jax._engine import trees
from hiso_jax.ledger import rebuild
from hiso_jax.models import adapters
from hiso_jax.train import digits, finetune, folders, job
from tests.helpers import REVIEWS, tiny_bert

pytestmark = pytest.mark.usefixtures("no_pictures")

CLIENTS = digits.digits(5)


def run(out: Path, problem: Any = CLIENTS, **options: Any) -> int:
    """A short job in this process; its exit code."""
    options = {"rounds": 2, "clients": 5, "clients_per_round": 2, "eval_every": 1} | options
    try:
        job.run(digits.Options(out=out, **options), problem, digits.LEARNING_RATES)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    """The same algorithm for runs of the same options and loss: it is compiled once."""
    real, made = job.algorithm, {}

    def algorithm(options: Any, problem: Any, rate: float) -> Any:
        same = dataclasses.replace(options, out=Path(), resume=None), problem.loss_fn, rate
        return made.setdefault(repr(same), real(options, problem, rate))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "algorithm", algorithm)
        yield


def test_a_measurement_that_fails_costs_a_number(tmp_path: Path):
    """The weights are those of a run that could measure, and so is the ledger."""

    def broken(params: Any) -> dict[str, float]:
        raise RuntimeError("the metric broke")

    assert run(tmp_path / "a") == 0
    assert run(tmp_path / "b", CLIENTS._replace(measure=broken)) == 1
    for name in ("model.safetensors", "ledger.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert summary["failed"] == ["RuntimeError: the metric broke"] and summary["accuracy"] > 0


def test_a_loss_that_turns_nan_ends_with_what_was_good(tmp_path: Path, capsys: Any):
    """The last state that was good is saved, the exit code is 1, and the reason is right."""

    def loss(params: Any, batch: Any) -> jax.Array:
        moved = jnp.abs(params["dense"]["bias"]).max() > 0.03
        return CLIENTS.loss_fn(params, batch) + jnp.where(moved, jnp.nan, 0)

    code = run(tmp_path / "run", CLIENTS._replace(loss_fn=loss), rounds=20, learning_rate=0.1)
    said = " ".join(capsys.readouterr().out.split())
    assert code == 1 and "rounds: see above" in said
    summary = json.loads((tmp_path / "run/summary.json").read_text(), parse_constant=pytest.fail)
    assert 0 < summary["rounds"] < 20 and "NaN" in summary["stopped"] and summary["accuracy"] > 0
    weights = load_file(tmp_path / "run/model.safetensors")
    assert all(np.isfinite(x).all() for x in weights.values())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("change, said", [
    (lambda p: p._replace(test={k: v[1:] for k, v in p.test.items()}), "the data of dev or test are"),
    (lambda p: p._replace(dev=p.test), "the data of dev or test are"),
    (lambda p: p._replace(classes=p.classes[::-1]), "the labels or their words are"),
    (lambda p: p._replace(params=jax.tree.map(lambda x: x + 1, p.params)), "the base model is"),
    (lambda p: digits.digits(6), "the clients' data are"), (lambda p: p, ""),
])  # fmt: skip
def test_a_run_goes_on_with_what_it_began_with(change: Any, said: str, tmp_path: Path, capsys: Any):
    out = tmp_path / "run"
    assert run(out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".json", ".jsonl")}
    assert run(out, change(CLIENTS), resume=out) == (1 if said else 0)
    assert said in " ".join(capsys.readouterr().out.split())
    after = {p.name: p.read_bytes() for p in out.iterdir() if p.suffix in (".json", ".jsonl")}
    assert not said or after == before


NUMBERS = sorted({errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL})


@pytest.mark.parametrize("number", NUMBERS)
def test_a_folder_on_a_mount_without_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folders.alone(tmp_path / "x[1]"):
        pass
    said = "".join(capsys.readouterr().out.split())
    assert "x[1]hasnolocks" in said


def test_a_folder_where_locks_need_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As NFS has it: and it is held, for a second process is refused."""
    real = fcntl.flock

    def nfs(handle: int, operation: int) -> None:
        flags = fcntl.fcntl(handle, fcntl.F_GETFL)
        if operation & fcntl.LOCK_EX and flags & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    with folders.alone(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        with folders.alone(tmp_path):
            pass
    with folders.alone(tmp_path):
        pass


def test_a_job_on_a_mount_without_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    assert run(tmp_path / "run") == 0


def reviews(path: Path) -> Path:
    lines = ["review,mood", *(f"{row['review']},{row['mood']}" for row in REVIEWS)]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("train", ["lora", "last-1", "prefix-3", "labels"])
def test_what_is_shipped_is_what_the_run_saved(train: str, tiny: Path, tmp_path: Path):
    """`replay` writes base and differences; joined, they are the run's files to the byte."""
    base = tiny_bert(tmp_path / "bert") if train == "labels" else tiny
    built = finetune.build(finetune.Options(
        model=str(base), data=reviews(tmp_path / "a.csv"), text="review", label="mood",
        clients=3, length=16, train="all" if train == "labels" else train,
    ))  # fmt: skip
    kind = train.partition("-")[0]
    assert built.adapter is not None and built.adapter["kind"] == kind
    rng = np.random.default_rng(0)
    beside = {n: x for n, x in trees.named(built.params).items() if n.startswith(kind)}
    extra = {n: rng.normal(0, 0.1, x.shape).astype(np.float32) for n, x in beside.items()}
    built.save(tmp_path / "run", trees.merge(built.params, jax.tree.map(jnp.asarray, extra)))
    made = tmp_path / "out"
    shutil.copytree(base, made)
    save_file(extra, made / "extra.safetensors")
    said = adapters.finish(built.adapter, base, made)
    assert f"{kind}.safetensors" in said
    ours, theirs = ({p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
                    for folder in (tmp_path / "run/model", made))  # fmt: skip
    assert ours == theirs and f"{kind}.safetensors" in ours
    if kind in ("lora", "last"):
        assert ours["model.safetensors"] != (base / "model.safetensors").read_bytes()


def test_a_prefix_begins_from_nobodys_text(tiny: Path, tmp_path: Path):
    """Whoever has base and ledger can make it; no client's words are in it."""
    model = models.from_pretrained(tiny, progress=False)
    found = adapters.prefix_tokens(model, 5)
    assert found == adapters.prefix_tokens(model, 5) and max(found) < model.config.vocab_size


def test_ledgers_that_do_not_say_how_to_merge(tmp_path: Path):
    """Of earlier versions: it is said that the weights are the base's."""

    old: Any = SimpleNamespace(header={"about": {}})
    (tmp_path / "extra.safetensors").write_bytes(b"")
    said = rebuild._finish(old, tmp_path, tmp_path)
    assert "extra.safetensors" in said and "does not say how to merge" in said
