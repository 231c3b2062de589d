"""`hiso predict`: new rows are labeled as the run that left the model measured its own."""

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from hiso_jax._engine import trees
from hiso_jax.tasks.data import read_file
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import finetune, llm, measure, predict, report, settings
from tests.helpers import REVIEWS, here, tiny_bert, tiny_roberta

OWN = ("--text", "review", "--label", "mood")
TEST = REVIEWS[90:]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


def splits(folder: Path) -> Path:
    """A folder of reviews in which everybody knows the test split."""
    for name, rows in (("train", REVIEWS[:70]), ("dev", REVIEWS[70:90]), ("test", TEST)):
        table(folder / f"{name}.csv", rows)
    return folder


def run_of(folder: Path, options: finetune.Options, build: Any = finetune.build) -> tuple[Any, Any]:
    """What a run leaves, without its rounds: everything that is trained is pushed at random."""
    problem: Problem = build(options)
    named, rng = trees.named(problem.params), np.random.default_rng(0)
    kind = options.train.partition("-")[0]
    own = [n for n in named if n.startswith(kind)] or list(named)  # beside the weights, or these
    push = {n: named[n] + rng.normal(0, 0.3, named[n].shape).astype(np.float32) for n in own}
    params = trees.merge(problem.params, push)
    settings.write(options, {"hiso": 0.1}, {})
    report.write_json(folder / "labels.json", report.counts(problem))
    problem.save(folder, params)
    return problem, params


def say(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    """What `hiso predict` says."""
    found, argv, sys.argv = 0, sys.argv, ["hiso predict", *map(str, arguments)]
    try:
        predict.cli()
    except SystemExit as end:
        found = end.code
    finally:
        sys.argv = argv
    said = capsys.readouterr().out
    assert found == code, said
    return said


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a decoder of which the first layers stayed: the cheapest to compile."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    run_of(folder, finetune.Options(
        model=str(tiny), data=splits(folder.parent / "data"), text="review", label="mood",
        clients=3, length=16, out=folder,
    ))  # fmt: skip
    return folder


@pytest.mark.parametrize("train, kind", [
    ("all", "llm"), ("prefix-3", "finetune"), ("labels", "finetune"),
    *(pytest.param(t, "finetune", marks=[pytest.mark.slow, pytest.mark.ci])
      for t in ("all", "lora", "last-1", "masked")),
])  # fmt: skip
def test_it_gives_the_logits_of_the_run(
    train: str, kind: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make = {"labels": tiny_bert, "masked": tiny_roberta}.get(train)
    out, base = tmp_path / "run", make(tmp_path / "base") if make else tiny
    more = dict(prompt="{review} It was", verbalizer=("bad", "good")) if train == "masked" else {}
    job: Any = llm if kind == "llm" else finetune
    problem, params = run_of(out, job.Options(
        model=str(base), data=splits(tmp_path / "data"), text="review", label="mood", clients=3,
        length=14, train="all" if make else train, out=out, **more,
    ), job.build)  # fmt: skip
    score = jax.jit(problem.score)
    with report.progress() as bar:
        (_, wanted), _ = measure.evaluate(problem, score, params, "test", bar)
    assert problem.logits is not None
    logits = np.asarray(jax.jit(problem.logits)(params, problem.prepare(problem.test)))
    shutil.rmtree(base) if make else None  # which is not needed
    shutil.rmtree(tmp_path / "data")
    said = say(capsys, out, "--data", table(tmp_path / "new.csv", TEST), "--out",
               tmp_path / "out.csv", "--batch-size", 16)  # fmt: skip
    assert f"accuracy {report.figure('accuracy', wanted)} (30 of 30 rows have a label)" in said
    rows = read_file(tmp_path / "out.csv")
    labels = ("down", "up")
    assert [row["prediction"] for row in rows] == [labels[i] for i in logits.argmax(-1)]
    chance = np.asarray(jax.nn.softmax(logits, axis=-1)).max(-1)
    given = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(given, chance, atol=2e-4)
    assert np.ptp(given) > 1e-3  # or all rows would be alike
    assert [{k: row[k] for k in TEST[0]} for row in rows] == TEST


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("train", ["all", "lora", "last-1", "prefix-3", "labels", "masked"])
def test_the_accuracy_is_that_of_the_runs_summary(
    train: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the job itself, once with the folders of two methods."""
    make, out = {"labels": tiny_bert, "masked": tiny_roberta}.get(train), tmp_path / "run"
    base, data = make(tmp_path / "base") if make else tiny, splits(tmp_path / "data")
    own = {"masked": ("--verbalizer", "bad", "good"), "labels": ("--compare",)}
    here(
        "finetune", "--model", str(base), "--data", str(data), *OWN, "--clients", "3",
        "--clients-per-round", "3", "--rounds", "9", "--learning-rate", "3e-3", "--length", "16",
        "--out", str(out), *own.get(train, ("--train", train)),
    )  # fmt: skip
    if train == "labels":
        asked = say(capsys, out, "--data", data / "test.csv", "--out", tmp_path / "o.csv", code=1)
        assert f"give the folder of one, {out / 'hiso'}" in asked
    for folder in (out / "hiso", out / "decomfl") if train == "labels" else (out,):
        target = tmp_path / f"{folder.name}.csv"
        said = say(capsys, folder, "--data", data / "test.csv", "--out", target)
        summary = json.loads((folder / "summary.json").read_text())
        assert f"accuracy {report.figure('accuracy', summary['accuracy'])} (30 of 30 rows" in said


def test_every_format_and_rows_without_labels(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Columns stay as they are and in order; what has no label is labeled and not measured."""
    new = [{"id": "01", "mood": "up", "review": 'a "fine"; film,\nlovely\r!', "tags": ["a", {"b": 1}]},
           {"id": "02", "mood": None, "review": None, "tags": None},
           {"id": "03", "mood": "", "review": "bad awful " * 20, "tags": []}]  # fmt: skip
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, new)))
    out = tmp_path / "made" / "out.csv"
    said = say(capsys, run, "--data", tmp_path / "new.jsonl", "--out", out)
    assert "Note: 2 of 3 texts take all tokens of the run's --length" in said
    assert "% (1 of 3 rows have a label)" in said
    assert f"Written to {out}" in said
    rows = read_file(out)
    assert list(rows[0]) == ["id", "mood", "review", "tags", "prediction", "probability"]
    assert [row["id"] for row in rows] == ["01", "02", "03"]
    assert rows[0]["review"] == new[0]["review"] and rows[0]["tags"] == '["a", {"b": 1}]'
    assert rows[1]["review"] == rows[1]["mood"] == rows[1]["tags"] == ""
    assert {row["prediction"] for row in rows} <= {"down", "up"}

    (tmp_path / "bare.tsv").write_text('1\tso "good"\n2\tso bad\n')
    more = ("--columns", "n", "review", "--out", tmp_path / "bare.csv", "--batch-size", 1)
    said = say(capsys, run, "--data", tmp_path / "bare.tsv", *more)
    assert "accuracy" not in said and "2 rows labeled: " in said
    first, second = read_file(tmp_path / "bare.csv")
    assert (first["n"], first["review"], second["n"]) == (1, 'so "good"', 2)


def test_a_run_on_the_docstrings(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Whose labels are numbers; their words are told."""
    run, words = tmp_path / "run", tuple("ABCDEF")  # which this tokenizer tells apart
    settings.write(llm.Options(model=str(tiny), verbalizer=words, out=run), {"rms": 0.1}, {})
    report.write_json(
        run / "labels.json", [{"label": str(i), "word": w} for i, w in enumerate(words)]
    )
    shutil.copytree(tiny, run / "model")
    new = table(tmp_path / "new.csv", [{"text": "Open a socket."}, {"text": "Add two numbers."}])
    said = say(capsys, run, "--data", new, "--out", tmp_path / "out.csv")
    given = {row["prediction"] for row in read_file(tmp_path / "out.csv")}
    assert given <= set(range(6)) and all(f" as {i} ({words[i]})" in said for i in given)


def test_f1_of_the_rows_that_have_a_label():
    """Macro F1, by hand; the others do not count."""
    problem: Any = Problem("", {}, None, None, None, {}, {}, None, metric="f1")  # type: ignore
    logits = np.array([[2.0, 1], [2, 1], [1, 2], [9, 0], [0, 1]])
    found = predict.measured(problem, logits, [0, 1, 1, None, None])
    np.testing.assert_allclose(found, (2 / 3 + 2 / 3) / 2)
    assert predict.measured(problem, logits, [0, 0, 1, 0, 1]) == 1.0


def test_a_broken_model_is_no_answer(run: Path):
    found = predict.read_run(run)
    problem = found.problem()
    broken = problem._replace(params=jax.tree.map(lambda x: x * np.nan, problem.params))
    with pytest.raises(ValueError, match="row 1: the model gives NaN"):
        predict.logits_of(broken, TEST)


@pytest.mark.parametrize("file, text, options, said", [
    ("a.csv", "text,mood\na,up\n", (), "a.csv lacks columns ['review']; it has ['text', 'mood']"),
    ("a.txt", "a film\n", (), "lacks columns ['review']; it has ['text']"),
    ("a.csv", "", (), "a.csv: the file is empty"), ("a.csv", "review,mood\n", (), "a.csv has no rows"),
    ("a.csv", "review,n\n,1\n", (), "a.csv: no row has a text, column 'review'"),
    ("a.csv", "review,mood\na,up\nb,so\n", (), "a.csv, row 2: column 'mood': expected one of ('down', 'up'), got 'so'; without"),
    ("a.csv", "review,prediction\na,b\n", (), "a.csv has a column 'prediction' already"),
    ("a.csv", "review,probability\na,b\n", (), "a.csv has a column 'probability' already"),
    ("a.xlsx", "x", (), "expected a suffix of"), ("b.csv", None, (), "b.csv: no such file"),
    ("a.csv", "review\na,b\n", (), "line 2: expected 1 fields, got 2"),
    ("a.jsonl", '{"review": ["a"]}', (), "a.jsonl, row 1: review: expected text, got ['a']"),
    ("a.jsonl", '{"review": "a", "mood": ["up"]}', (), "a.jsonl, row 1: mood: expected text"),
    ("a.jsonl", '{"review": "a"}', ("--columns", "review"), "only CSV and TSV can lack a header"),
    ("a.csv", "review\na\n", ("--out", "there.csv"), "--out: there.csv exists; nothing is written over"),
    ("a.csv", "review\na\n", ("--out", "out.txt"), "--out: expected a name that ends in .csv"),
    ("a.csv", "review\na\n", ("--out", "folder"), "--out: expected a name that ends in .csv"),
    ("a.csv", "review\na\n", ("--batch-size", "0"), "--batch-size: expected an int >= 1, got 0"),
])  # fmt: skip
def test_rows_that_cannot_be_labeled(
    file: str, text: str | None, options: Any, said: str, run: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """One line, before the model is read, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "build", pytest.fail)
    Path("there.csv").write_text("x")
    Path("folder").mkdir()
    if text is not None:
        Path(file).write_text(text)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = say(capsys, run, "--data", file, *options, code=1)
    assert said in found and found.count("\n") == 1, found
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("saved, said", [
    (None, "RUN: run is not there; expected the folder of a job"), ("", "RUN: run is no run"),
    ("{}", "RUN: run is no run"), ("[]", "RUN: run is no run"),
    ({"job": "digits"}, "RUN: run is a run of hiso digits; hiso predict labels texts, with runs of"),
    ({"job": "images"}, "RUN: run is a run of hiso images"),
    ({"options": {"task": "lm"}}, "RUN: run is a run of --task lm, which has no labels"),
    ({"options": {"task": "squad"}}, "RUN: run is a run of --task squad, which has no labels"),
    ({}, "RUN: run has no model yet, which a run writes when it ends; to go on with it: hiso finetune --resume run"),
    ({"learning_rates": {"hiso": 1, "decomfl": 1}}, "RUN: run has a run of each of hiso, decomfl; give the folder of one, run/hiso"),
])  # fmt: skip
def test_runs_that_label_nothing(
    saved: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text("text\na\n")
    if saved is not None:
        Path("run").mkdir()
        whole = {"job": "finetune", "options": {}, "learning_rates": {"hiso": 1}}
        text = json.dumps(whole | saved) if isinstance(saved, dict) else saved
        Path("run/options.json").write_text(text)
    found = say(capsys, "run", "--data", "new.csv", code=1)
    assert said in found and found.count("\n") == 1, found
    assert not Path("predictions.csv").exists()


def test_a_model_without_what_was_trained_beside_it(tmp_path: Path):
    """It would answer, by labels that nobody trained."""
    run = tmp_path / "run"
    run_of(run, finetune.Options(
        model=str(tiny_bert(tmp_path / "base")), data=splits(tmp_path / "data"), text="review",
        label="mood", clients=3, length=14, out=run,
    ))  # fmt: skip
    path, found = run / "model/labels.safetensors", predict.read_run(run)
    save_file({"labels": np.ones((3, 32), np.float32)}, path)
    with pytest.raises(ValueError, match=r"labels.safetensors has 3 labels, expected 2"):
        found.problem()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="labels.safetensors is not there, which the run"):
        found.problem()
