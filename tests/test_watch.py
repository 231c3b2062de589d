"""What a run writes as it goes, and who follows it: TensorBoard, Weights & Biases, `hiso watch`."""

import dataclasses
import io
import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from hiso_jax.train import digits, folders, logs, progress, report, settings, watch
from tests.helpers import here, refuse
from tests.helpers import rows as rows_of

SHORT = ("--rounds", "4", "--eval-every", "2", "--clients-per-round", "4")


def rows(count: int, every: int = 2) -> list[dict[str, Any]]:
    """Rows of so many rounds; one of them has a loss that is no number."""
    out: list[dict[str, Any]] = [{"round": 0, "dev_loss": 2.0, "dev_accuracy": 0.1}]
    for number in range(1, count + 1):
        row: dict[str, Any] = dict(round=number, loss=None if number == 2 else 2 - number / 10,
                                   clients=["a"], uplink_bytes=80 * number,
                                   downlink_bytes=90 * number, seconds=0.1)  # fmt: skip
        if number % every == 0:
            row |= {"dev_loss": 2 - number / 8, "dev_accuracy": 0.1 * number}
        out.append(row)
    return out


def run_folder(folder: Path, methods: tuple[str, ...] = ("hiso",), rounds: int = 8) -> Path:
    """What a job writes down before its first round."""
    folder.mkdir()
    saved = {
        "job": "digits",
        "options": {"rounds": rounds},
        "learning_rates": dict.fromkeys(methods, 0.1),
    }
    report.write_json(folder / "options.json", saved)
    for method in methods if len(methods) > 1 else ():
        (folder / method).mkdir()
    return folder


def end(folder: Path, rounds: int, **more: Any) -> None:
    """What a job writes at the end."""
    summary = dict(metric="accuracy", accuracy=0.9, accuracy_before=0.1, rounds=rounds)
    report.write_json(folder / "summary.json", summary | more)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed, where there is no terminal."""
    out = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=out, width=200))
    return out


@pytest.mark.slow
@pytest.mark.ci
def test_all_logs_have_the_rows_of_the_run(tmp_path: Path):
    """By the job; and again when it is gone on with: those before are not lost, nor there twice."""
    pytest.importorskip("tensorboardX")
    out = tmp_path / "run"
    here("digits", *SHORT, "--out", str(out), "--log", "tensorboard")
    assert events(out) == expected(out) and len(rows_of(out)) == 5
    (out / "summary.json").unlink()  # as if it had been killed before its end
    here("digits", "--resume", str(out))
    assert events(out) == expected(out)


def expected(out: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in logs.numbers(row).items():
            found.setdefault(name, {})[row["round"]] = pytest.approx(value, rel=1e-6)
    assert {"loss", "dev_loss", "dev_accuracy", "uplink_bytes", "downlink_bytes", "seconds"} == {
        *found
    }
    return found


def events(out: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would read: its files are TFRecords of protobufs."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for path in (out / "tensorboard").glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    assert event.step not in found.get(value.tag, {})
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


class FakeRun:
    """A run of the package wandb, of which only what is used here is there."""

    made: ClassVar[list["FakeRun"]] = []

    def __init__(self, **options: Any):
        self.options, self.logged, self.finished = options, {}, False
        FakeRun.made.append(self)

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged[step] = values

    def finish(self) -> None:
        self.finished = True


def test_wandb_is_given_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a stand-in; `test_wandb_itself` has the package."""
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=FakeRun))  # type: ignore
    monkeypatch.setattr(FakeRun, "made", [])
    every, about = rows(4), {"method": "hiso", "task": "digits", "seed": 3}
    with logs.opened(tmp_path, every[:2], ["wandb"], about) as note:
        for row in every[2:]:
            note(row)
    with logs.opened(tmp_path, every, ["wandb"], about):
        pass
    first, second = FakeRun.made
    assert first.logged == second.logged == {row["round"]: logs.numbers(row) for row in every}
    assert first.finished and second.finished
    assert first.options["id"] == second.options["id"] and first.options["resume"] == "allow"
    assert first.options["config"] == about and first.options["name"] == "hiso: digits"
    assert rows_of(tmp_path)[-1]["round"] == 4


def test_a_log_that_cannot_begin_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(**options: Any) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuses))  # type: ignore
    with pytest.raises(OSError, match="--log wandb: api_key not configured"):
        with logs.opened(tmp_path, [], ["wandb"]):
            pass


@pytest.mark.slow
def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with logs.opened(tmp_path, rows(2), ["wandb"], {"method": "hiso", "task": "digits"}) as note:
        note(rows(3)[-1])
    (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 20  # a process of its own writes it
    while b"dev_accuracy" not in kept.read_bytes():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_package_that_is_not_there_is_named_at_the_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(logs.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ValueError, match="--log wandb needs no_such_package: pip install no_such"):
        settings.check(dataclasses.replace(digits.Options(), log=("wandb",)))
    output = refuse("digits", "--log", "wandb", "--out", str(tmp_path / "run"))
    assert "pip install no_such_package" in output and "exit 1" in output
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_shown(tmp_path: Path, said: io.StringIO):
    folder = run_folder(tmp_path / "run")
    with logs.opened(folder, rows(8)):
        pass
    end(folder, 8)
    watch.watch(folder, every=0.01)
    lines = said.getvalue().splitlines()
    assert lines[0].split()[:3] == ["HiSo", "round", "8/8"] and "dev 80.0%" in lines[0]
    assert "8 rounds, test accuracy 10.0% before, 90.0% after" in lines[1] and len(lines) == 2


def test_a_run_is_followed_to_its_end(tmp_path: Path, said: io.StringIO):
    """Two methods, one after the other, one of which was stopped before and is gone on with."""
    folder, every = run_folder(tmp_path / "run", ("hiso", "decomfl")), rows(8)
    with logs.opened(folder / "hiso", every[:3]):
        pass
    end(folder / "hiso", 2)  # an end that is no longer the last word
    time.sleep(0.02)

    def work() -> None:
        with folders.alone(folder):
            for method in ("hiso", "decomfl"):
                start = 3 if method == "hiso" else 0
                with logs.opened(folder / method, every[:start]) as note:
                    for row in every[start:]:
                        time.sleep(0.01)
                        note(row)
                end(folder / method, 8)

    worker = threading.Thread(target=work)
    worker.start()
    while not (folder / "decomfl" / "metrics.jsonl").exists():
        time.sleep(0.01)
    watch.watch(folder, every=0.005)
    worker.join()
    text = said.getvalue()
    assert text.count("90.0% after") == 2 and "DeComFL  round 8/8" in text


def test_a_run_that_was_killed_is_not_waited_for(tmp_path: Path, said: io.StringIO):
    folder = run_folder(tmp_path / "run")
    with logs.opened(folder, rows(3)):
        pass
    (folder / ".lock").touch()
    watch.watch(folder, every=0.01, silent=0.05)
    assert f"hiso digits --resume {folder}" in said.getvalue()
    with folders.alone(folder):
        assert watch.alive(folder)
    assert not watch.alive(folder)


def test_what_a_terminal_shows(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    with logs.opened(folder, rows(6)):
        pass
    options, parts = watch.parts_of(folder)
    parts["hiso"].look()
    out = Console(width=120, file=io.StringIO(), force_terminal=True, color_system=None)
    out.print(watch.view(parts, options))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "HiSo  round 6/8  loss 1.400  dev 60.0%" in text and "about 0.2 s left" in text
    assert "█▆▃▁" in text and "▁▂▅█" in text


@pytest.mark.parametrize("what", ["nothing", "a file", "a folder", "cut"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, what: str):
    path = tmp_path / "run"
    if what == "a file":
        path.write_text("x")
    elif what != "nothing":
        path.mkdir()
    if what == "cut":
        (path / "options.json").write_text('{"job": "dig')
    with pytest.raises(ValueError, match=r"RUN: .*expected the folder of a job"):
        watch.watch(path)


def test_a_loss_that_nobody_is_told_is_unknown(tmp_path: Path):
    line = watch.line(watch.Part(tmp_path, rows(2)), {"rounds": 8})
    assert "round 2/8  loss unknown  dev 20.0%" in line and "None" not in line


@pytest.mark.parametrize("width, most", [(40, 3), (80, 3), (200, 1)])
def test_figures_beside_a_bar_are_read_in_any_terminal(width: int, most: int):
    """In a narrow one there is no bar: beside it figures were a column of four letters."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    bar = progress.progress(console)
    status = "loss 0.650  dev 76.9%  32.7 rounds/s  up 16.0 kB  down 144.2 kB"
    bar.add_task("DeComFL", total=300, completed=100, status=status)
    lines = console.render_lines(bar.get_renderable())  # pyright: ignore
    assert len(lines) <= most
