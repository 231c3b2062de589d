"""Jobs as real processes: what they leave, and that killed ones go on to the same bits.

That each boundary of a round may be the last, that rounds may be empty, disks full and people press
Ctrl-C is tested without processes, in `test_crashes`.
"""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import finish, outcome, remount, rows, start

ROUNDS = 200
OPTIONS = ("--rounds", str(ROUNDS), "--eval-every", "40", "--snapshot-every", "30",
           "--dropout", "0.3", "--clients-per-round", "2", "--distribution", "normal")  # fmt: skip
SHORT = 120
SHORT_OPTIONS = ("--rounds", str(SHORT), "--eval-every", "20", "--snapshot-every", "30",
                 "--distribution", "normal", "--seed", "3")  # fmt: skip
SUMMARY = {"method", "rounds", "accuracy_before", "accuracy", "uplink_bytes_per_client",
           "downlink_bytes_per_client", "seconds_per_round", "compile_seconds"}  # fmt: skip


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder and what was printed, of a run that nothing happened to; all answered."""
    folder = tmp_path_factory.mktemp("short")
    return folder, finish(start("digits", *SHORT_OPTIONS, "--out", str(folder)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start("digits", *OPTIONS, "--out", str(folder)))
    result = outcome(folder)
    assert len(result["rows"]) == ROUNDS + 1
    assert any(row["loss"] is None for row in result["rows"][1:])  # rounds nobody answered
    snapshots = sorted(p.name for p in (folder / "snapshots").iterdir())
    assert snapshots == ["round-00000180.safetensors", "round-00000200.safetensors"]
    return result


def go_on(folder: Path) -> tuple[str, ...]:
    """Arguments that start a run, or go on with it if its options had been written."""
    if (folder / "options.json").exists():
        return ("--resume", str(folder))
    return (*OPTIONS, "--out", str(folder))


def killed_until_done(folder: Path, seed: int, kills: int) -> int:
    """Kill a run `kills` times, at a random time or after a random round; then let it end."""
    rng, happened = random.Random(seed), 0
    for number in range(kills):
        process = start("digits", *go_on(folder))
        if (seed + number) % 3 == 0:
            time.sleep(rng.uniform(0, 6))
        else:
            length, log = rng.randrange(ROUNDS), folder / "metrics.jsonl"
            while process.poll() is None:
                if log.exists() and log.read_bytes().count(b"\n") >= length:
                    break
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.01))
        happened += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("digits", *go_on(folder)))
    return happened


@pytest.mark.slow
def test_a_hundred_killed_runs_end_in_the_same_bits(tmp_path: Path, undisturbed: dict[str, Any]):
    def one(seed: int) -> int:
        folder = tmp_path / f"{seed}"
        happened = killed_until_done(folder, seed, kills=1 + seed % 2)
        assert outcome(folder) == undisturbed, seed
        shutil.rmtree(folder)
        return happened

    with ThreadPoolExecutor(2) as pool:
        happened = list(pool.map(one, range(100, 210)))
    print(f"{len(happened)} runs killed {sum(happened)} times")
    assert sum(count > 0 for count in happened) >= 100


def wait_for(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Until a run has written so many rows, or has ended."""
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > count):
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.ci
def test_a_job_leaves_its_folder(short: tuple[Path, str]):
    folder, output = short
    assert "test accuracy after" in output and "FedAvg would have moved" in output
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "curve.png", "labels.json", "ledger.safetensors", "ledger.sqlite", "metrics.jsonl",
        "model.safetensors", "options.json", "report.html", "snapshots", "split.png", "summary.json"}  # fmt: skip
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    # a round: 8 of 40 clients x 10 float32
    assert summary["uplink_bytes_per_client"] == SHORT * 8 * 40 / 40
    # the key, the number of a round when asked, and the records with their learning rates
    assert summary["downlink_bytes_per_client"] == 8 + SHORT * 8 * 4 / 40 + SHORT * (40 + 4)
    assert summary["payload_bytes"] == SHORT * (40 + 4)
    shipped = (folder / "ledger.safetensors").stat().st_size
    assert 0 < shipped - SHORT * (40 + 4) < 4096 and summary["shipped_bytes"] == shipped
    assert summary["accuracy"] > summary["accuracy_before"]
    assert [row["round"] for row in rows(folder)] == list(range(SHORT + 1))


@pytest.mark.slow
@pytest.mark.ci
def test_killed_and_on(tmp_path: Path, short: tuple[Path, str]):
    """Runs that are begun with the same options reach the same bits, whatever happens to them."""
    undisturbed, log = outcome(short[0]), tmp_path / "metrics.jsonl"
    process = start("digits", *SHORT_OPTIONS, "--out", str(tmp_path))
    wait_for(process, log, 17)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 17 < len(rows(tmp_path)) < SHORT
    shutil.rmtree(tmp_path / "snapshots", ignore_errors=True)  # the ledger alone is enough
    finish(start("digits", "--resume", str(tmp_path)))
    assert outcome(tmp_path) == undisturbed
    assert not list(tmp_path.glob("*.sqlite-*"))


@pytest.mark.slow
def test_files_that_may_not_grow(tmp_path: Path, undisturbed: dict[str, Any]):
    """The same with a limit on the size of a file, which the log reaches first."""
    for number, size in enumerate((8_000, 16_000, 40_000)):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
        process = start("digits", *go_on(tmp_path), preexec_fn=limit)
        output = finish(process, code=1)
        assert "What was recorded is safe" in output and "Traceback" not in output, number
    finish(start("digits", *go_on(tmp_path)))
    assert outcome(tmp_path) == undisturbed


@pytest.mark.slow  # refused as a full disk is
def test_read_only(disk: Path, undisturbed: dict[str, Any]):
    remount(disk, "size=100m")
    folder = disk / "run"
    process = start("digits", *OPTIONS, "--out", str(folder))
    wait_for(process, folder / "metrics.jsonl", 20)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    remount(disk, "ro")
    before = {p.name: p.stat().st_size for p in folder.iterdir()}
    for arguments in (("--resume", str(folder)), (*OPTIONS, "--out", str(disk / "other"))):
        output = finish(start("digits", *arguments), code=1)
        assert "Read-only file system" in output and "Traceback" not in output
        # Of the other nothing was.
        assert ("What was recorded is safe" in output) == ("--resume" in arguments)
    assert {p.name: p.stat().st_size for p in folder.iterdir()} == before
    remount(disk, "rw")
    finish(start("digits", "--resume", str(folder)))
    assert outcome(folder) == undisturbed


@pytest.mark.slow
def test_a_comparison_goes_on_with_the_method_it_was_at(tmp_path: Path):
    options = ("--compare", "--rounds", "60")
    finish(start("digits", *options, "--out", str(tmp_path / "whole")))
    process = start("digits", *options, "--out", str(tmp_path / "cut"))
    while process.poll() is None and not (tmp_path / "cut/decomfl/metrics.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(start("digits", "--resume", str(tmp_path / "cut")))
    for method in ("hiso", "decomfl"):
        assert outcome(tmp_path / "cut" / method) == outcome(tmp_path / "whole" / method)


@pytest.mark.slow  # without processes in `test_crashes`
def test_a_run_under_way_is_left_alone(tmp_path: Path):
    first = start("digits", "--rounds", "1000000", "--out", str(tmp_path / "run"))
    wait_for(first, tmp_path / "run" / "metrics.jsonl", 5)
    # Processes of their own: first weights drawn without optimization would be others.
    for others in (("--resume",), ("--rounds", "3", "--out")):
        output = finish(start("digits", *others, str(tmp_path / "run")), code=1)
        assert "another process is running there" in output
    first.send_signal(signal.SIGINT)
    finish(first)
    done = json.loads((tmp_path / "run/summary.json").read_text())["rounds"]
    assert len(rows(tmp_path / "run")) == done + 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
