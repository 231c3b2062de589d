"""What people see of the jobs: how they end, and their help. As real processes: `test_resume`."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hiso_jax.models import cnn
from hiso_jax.train import cli, digits, report
from hiso_jax.train import job as jobs
from tests.helpers import assert_same_bits, finish, here, refuse, start

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_the_digits_and_first_weights_are_those_of_the_libraries():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    np.testing.assert_array_equal(digits.table(), np.c_[theirs.data, theirs.target])
    for shape in ((3, 3, 1, 16), (96, 10)):
        inits = (cnn.lecun_normal, nnx.initializers.lecun_normal())
        assert_same_bits(*(init(jax.random.key(1), shape) for init in inits))


@pytest.mark.slow
def test_compare_draws_both(tmp_path: Path):
    output = finish(start("digits", "--compare", "--rounds", "20", "--out", str(tmp_path)))
    assert "HiSo" in output and "DeComFL" in output
    both = json.loads((tmp_path / "summary.json").read_text())
    assert [s["method"] for s in both] == ["hiso", "decomfl"]
    first = [json.loads((tmp_path / m / "metrics.jsonl").read_text().splitlines()[5])
             for m in ("hiso", "decomfl")]  # fmt: skip
    assert first[0]["clients"] == first[1]["clients"]  # the same seeds


def test_divergence_is_said(tmp_path: Path):
    """And seen by scripts: the exit code is 1, and the JSON has no word that is not JSON."""
    options = ("--learning-rate", "1e6", "--rounds", "50", "--out", str(tmp_path))
    output = here("digits", *options, code=1)
    assert "sent scalars that are NaN, infinite" in output and "It ended after" in output
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["rounds"] < 50 and "beyond 1e+12" in summary["stopped"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("job, option", [
    ("finetune", "--rounds"), ("digits", "--per-client-directions"), ("mnist", "--alpha"), ("images", "--size"),
    ("compare", "--vary"), ("results", "--where"), ("robustness", "--shares"),
    ("curvature", "--decay"),
])  # fmt: skip
def test_help(job: str, option: str):
    output = refuse(job, "--help")
    assert option in output and "exit 0" in output


def test_the_command_is_no_place_for_advice_about_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["hiso", "watch", "nowhere"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS") == "1"


def test_the_command_prints_any_name_and_ends_at_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    """In any terminal: names of files are bytes, and encodings lack most signs."""
    out = io.TextIOWrapper(io.BytesIO(), "latin-1")

    def job() -> None:
        report.say("not read: \u65e5\u672c, r\udce9sum\xe9.docx")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(digits, "cli", job)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["hiso", "digits"])
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = out.buffer.getvalue().decode("latin-1")  # type: ignore
    assert end.value.code == 130 and "\\u65e5\\u672c, r\\udce9sum\xe9.docx" in said


def test_names_that_no_picture_can_have_end_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    problem = digits.digits(5)
    options = digits.Options(out=tmp_path)

    def refuse(*given: object) -> None:
        raise TypeError("no str")

    monkeypatch.setattr(jobs.report, "draw_split", refuse)
    jobs._picture_split(options, problem)
    assert "Not drawn: split.png: no str" in capsys.readouterr().out
