"""A job that ends at any boundary of any round goes on to the same bits: crashes in this process.

One compiled program for all of them. Real processes, which are really killed: `test_resume`.
"""

import json
import re
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hiso_jax as hj
from hiso_jax.ledger import snapshots
from hiso_jax.train import digits, folders, job
from tests.helpers import draw_nothing, outcome, refuse, remount, rows

ROUNDS, EVERY = 7, 2
PROBLEM = digits.digits(5)
OPTIONS: dict[str, Any] = dict(rounds=ROUNDS, clients=5, clients_per_round=2, eval_every=3,
                               snapshot_every=EVERY, dropout=0.5, method="hiso")  # fmt: skip
ALGORITHM = job.algorithm(digits.Options(**OPTIONS), PROBLEM, digits.LEARNING_RATES["hiso"])


class Crash(BaseException):
    """What nothing in a job handles."""


def run(out: Path, problem: Any = PROBLEM, **options: Any) -> int:
    """A job in this process; its exit code."""
    try:
        job.run(digits.Options(out=out, **OPTIONS | options), problem, digits.LEARNING_RATES)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def go_on(out: Path, problem: Any) -> int:
    """Begin a run, or go on with it."""
    return run(out, problem, resume=out if (out / "options.json").exists() else None)


@pytest.fixture(scope="module", autouse=True)
def one_program() -> Iterator[None]:
    """The same algorithm for all runs, and no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "algorithm", lambda *_: ALGORITHM)
        draw_nothing(patch)
        yield


@pytest.fixture(scope="module")
def undisturbed(one_program: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder) == 0
    result = all_of(folder)
    assert [row["round"] for row in result["rows"]] == list(range(ROUNDS + 1))
    assert any(row["loss"] is None for row in result["rows"][1:])  # rounds nobody answered
    return result


def all_of(folder: Path) -> dict[str, Any]:
    return outcome(folder) | {"ledger": (folder / "ledger.safetensors").read_bytes()}


def torn(path: Path) -> None:
    """The end of a file did not reach the disk."""
    path.write_bytes(path.read_bytes()[:-9])


EVERY_ROUND, SNAPSHOTS, END = set(range(ROUNDS)), {2, 4, 6, 7}, {ROUNDS}
# Name -> what is called there, the rounds it is called in, and what is done before the crash.
POINTS: dict[str, tuple[str, set[int], Callable[[Path, Callable[[], Any]], Any]]] = {
    "row written": ("append", EVERY_ROUND, lambda out, real: None),
    "row torn": ("append", EVERY_ROUND, lambda out, real: torn(out / "metrics.jsonl")),
    "record appended": ("append", EVERY_ROUND, lambda out, real: real()),
    "before a snapshot": ("snapshot", SNAPSHOTS, lambda out, real: None),
    "snapshot torn": ("snapshot", SNAPSHOTS, lambda out, real: torn(real())),
    "after a snapshot": ("snapshot", SNAPSHOTS, lambda out, real: real()),
    "before the compact ledger": ("export", END, lambda out, real: None),
    "compact ledger torn": (
        "export",
        END,
        lambda out, real: (real(), torn(out / "ledger.safetensors")),
    ),
    "before the weights": ("weights", END, lambda out, real: None),
    "weights torn": ("weights", END, lambda out, real: (real(), torn(out / "model.safetensors"))),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_any_point_of_any_round(
    point: str, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """There in every round in turn: it goes on, and crashes in the next one, until none is left."""
    name, wanted, what = POINTS[point]
    seen: set[int] = set()

    def crashing(real: Callable[..., Any], round_of: Callable[..., int]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if (round := round_of(*given)) in seen:
                return real(*given)
            seen.add(round)
            what(tmp_path, lambda: real(*given))
            raise Crash

        return call

    problem = PROBLEM
    if name == "snapshot":
        save = crashing(snapshots.save, lambda folder, alg, state: int(state.round))
        monkeypatch.setattr(snapshots, "save", save)
    elif name == "weights":
        problem = PROBLEM._replace(save=crashing(PROBLEM.save, lambda *_: ROUNDS))
    else:
        call = crashing(getattr(hj.Ledger, name), lambda ledger, *_: ledger.rounds)
        monkeypatch.setattr(hj.Ledger, name, call)
    for _ in wanted:
        with pytest.raises(Crash):
            go_on(tmp_path, problem)
    assert seen == wanted
    for _ in range(2):  # once more changes nothing
        assert go_on(tmp_path, problem) == 0
        assert all_of(tmp_path) == undisturbed
    assert not list(tmp_path.glob("*.sqlite-*"))


def interrupt(monkeypatch: pytest.MonkeyPatch, times: int, round: int = 3) -> None:
    """Press Ctrl-C so many times in a round."""
    real = hj.Ledger.append

    def append(ledger: hj.Ledger, *given: Any) -> int:
        if ledger.rounds == round:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(ledger, *given)

    monkeypatch.setattr(hj.Ledger, "append", append)


def test_ctrl_c_and_on(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """The round is taken to its end, all is left as at the end of a run, and it goes on."""
    interrupt(monkeypatch, 1)
    assert run(tmp_path) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "keepingwhatwasdone" in said and f"--resume{tmp_path}" in said
    stopped = json.loads((tmp_path / "summary.json").read_text())
    assert stopped["rounds"] == 4 and stopped["digest"] != undisturbed["digest"]
    assert (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    assert go_on(tmp_path, PROBLEM) == 0
    assert all_of(tmp_path) == undisturbed


def test_ctrl_c_begins_no_other_method(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """Of two methods, the second is left for the run that goes on."""
    interrupt(monkeypatch, 1)
    assert run(tmp_path, compare=True) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"To go on with it: --resume {tmp_path}" in said and not (tmp_path / "decomfl").exists()
    monkeypatch.undo()
    assert run(tmp_path, compare=True, resume=tmp_path) == 0
    assert "To go on" not in capsys.readouterr().out
    assert all_of(tmp_path / "hiso") == undisturbed
    assert json.loads((tmp_path / "decomfl/summary.json").read_text())["rounds"] == ROUNDS


def test_ctrl_c_in_the_last_round_of_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupt(monkeypatch, 1, ROUNDS - 1)
    assert run(tmp_path, compare=True) == 0 and not (tmp_path / "decomfl").exists()


def test_ctrl_c_outside_of_the_rounds(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """Before them nothing is there; and a second one does not wait for the round's end."""
    out = tmp_path / "my run"
    monkeypatch.setattr(sys, "argv", ["hiso digits", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        job.main(digits.Options, lambda _: signal.raise_signal(signal.SIGINT), {"hiso": 0.1})  # type: ignore
    said = capsys.readouterr().out
    assert end.value.code == 130 and said.endswith("Stopped.\n") and not out.exists()
    interrupt(monkeypatch, 2)
    assert run(out) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert f"Stopped. What was recorded is safe. To go on: --resume '{out}'" in said
    monkeypatch.undo()
    assert go_on(out, PROBLEM) == 0
    assert all_of(out) == undisturbed


@pytest.mark.parametrize("kilobytes", [(40,), (60, 100)])
def test_disk_full(
    kilobytes: tuple[int, ...],
    disk: Path,
    undisturbed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
):
    """Once, or twice: on a disk that is larger, where there is more of a run, and still full."""
    folder = disk / "run"
    for size in kilobytes:
        remount(disk, f"size={size}k")
        assert go_on(folder, PROBLEM) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert re.search("disk is full|No space left", said) and "Traceback" not in said, said
        assert "What was recorded is safe" in said
    remount(disk, "size=100m")
    assert go_on(folder, PROBLEM) == 0
    assert all_of(folder) == undisturbed


def test_a_run_under_way_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert run(out, rounds=1) == 0
    with folders.alone(out):
        for options in (dict(resume=out), {}):
            assert run(out, **options) == 1
            assert "another process is running there" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and len(rows(out)) == 2


def test_nothing_is_written_over_and_bad_resumes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    assert run(out, rounds=2) == 0
    first = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert run(out, rounds=3) == 0
    assert "is now in" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run.1" / "model.safetensors").read_bytes() == first
    assert len(rows(out)) == 4 and list((tmp_path / "run.1/snapshots").iterdir())
    with sqlite3.connect(out / "ledger.sqlite") as connection:
        connection.execute("UPDATE records SET learning_rate = 1.0 WHERE round = 1")
    connection.close()
    bad = [
        (("digits", "--resume", str(tmp_path / "no")), "no run to resume"),
        (("digits", "--resume", str(out), "--rounds", "9"), "--rounds cannot be given with it"),
        (("finetune", "--resume", str(out)), "is a run of `hiso digits`"),
    ]
    for arguments, message in bad:
        output = refuse(*arguments)
        assert message in output and "exit 1" in output
    assert run(out, resume=out) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "the record of round 1: it is not as it was written" in said
