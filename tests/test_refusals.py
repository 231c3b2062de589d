"""What is asked for and cannot be had: one line, exit code 1, nothing written or moved."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from hiso_jax.tasks import text_problem
from hiso_jax.tasks.prompts import TASKS, Task
from hiso_jax.train import digits, finetune, images, llm, notes, report
from hiso_jax.train import settings as kept
from tests.helpers import REVIEWS, refuse

OWN = ("--text", "review", "--label", "mood")
FILE = "reviews.csv"


def csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def place(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a file of reviews, and a run that must stay where it is."""
    monkeypatch.chdir(tmp_path)
    csv(tmp_path / FILE, REVIEWS)
    (tmp_path / "model").symlink_to(tiny)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/options.json").write_text("{}")
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    found = (p for p in folder.rglob("*") if p.is_file() and "model" not in p.parts)
    return {str(p): p.read_bytes() for p in found}


def refused(*options: str) -> str:
    before = tree(Path())
    said = refuse("finetune", "--model", "model", "--out", "run", *options)
    assert said.endswith("exit 1") and "Traceback" not in said, said
    assert tree(Path()) == before  # nothing is written, nothing is moved aside
    return said


@pytest.mark.parametrize("options, said", [
    (("--task", "nothing"), "--task: expected docstrings or one of"),
    (("--text", "review", "--label", "nobody"), "lacks columns ['nobody']"),
    (("--text", "nobody", "--label", "mood"), "lacks columns ['nobody']; it has ['review'"),
    ((*OWN, "--verbalizer", "a"), "--verbalizer: expected 2"), ((*OWN, "--verbalizer", "a", ""), "verbalizer: expected none"),
    ((*OWN, "--verbalizer", "up", "up"), "not told apart"),
    ((*OWN, "--train", "some"), "--train: expected all"), ((*OWN, "--train", "last-0"), "--train: expected"),
    ((*OWN, "--train", "last-9"), "expected 1 to 2 layers"),
    ((*OWN, "--train", "lora", "--lora-targets", "x"), "targets: expected some of"),
    ((*OWN, "--train", "lora", "--lora-rank", "0"), "--lora-rank: expected an int >= 1"),
    ((*OWN, "--length", "4"), "--length: expected at least 8"),
    ((*OWN, "--length", "81"), "--length: expected at most 80 tokens, the model's positions; got 81"),
    ((*OWN, "--length", "80", "--train", "prefix-3"), "at most 77 tokens"),
    ((*OWN, "--train", "prefix-75"), "--train: prefix-75 leaves 5 of the model's 80 positions"),
    ((*OWN, "--train", "prefix-1000"), "--train: prefix-1000 leaves 0 of"),
    ((*OWN, "--lora-alpha", "nan"), "--lora-alpha"), ((*OWN, "--lora-targets"), "--lora-targets: expected"),
    ((*OWN[:3], ""), "--label: expected something"), ((*OWN, "--out", ""), "--out: expected a folder of its own"),
    ((*OWN, "--learning-rate", "1e39"), "--learning-rate"), ((*OWN, "--rounds", "3000000000"), "--rounds"),
    ((*OWN, "--batch-size", "100000000"), "--batch-size"), ((*OWN, "--smoothing", "1e-46"), "--smoothing"),
    ((*OWN, "--mesh", "0", "1"), "--mesh"),
    ((*OWN, "--clients", "85"), "--clients: expected at most 84"),
    ((*OWN, "--clients", "4"), "--clients-per-round: expected at most 4"),
    ((*OWN, "--split", "column", "--client-column", "nobody"), "--client-column: train has no column 'nobody'"),
    ((*OWN, "--client-column", "who"), "--client-column who: needs --split column"),
    ((*OWN, "--split", "column", "--client-column", "who"), "--clients-per-round: expected at most 4"),
    (("--prompt", "{} It was", "--label", "mood"), "prompt: no column between '{}'"),
    (("--prompt", "{review", "--label", "mood"), "prompt: no partner for '{'"),
    (("--prompt", "{reviw} It was", "--label", "mood"), "lacks columns ['reviw']"),
    (("--prompt", "It was", "--label", "mood"), "--prompt: 'It was' names no column"),
    ((*OWN, "--prompt", "{who} It was"), "--text: 'review' is not in --prompt"),
    (("--task", "sst2", "--text", "review", "--label", "mood"), "train, row 1: column 'mood': expected one of (0, 1)"),
    (("--task", "sst2", "--text", "review", "--verbalizer", "a", "b", "c"), "--verbalizer: expected 2, one a label of sst2"),
    (("--task", "squad", "--text", "review"), "--text: squad reads the columns"),
    (("--task", "lm", "--text", "review", "--verbalizer", "a"), "--verbalizer: --task lm reads plain text"),
    (("--label", "mood"), "--text: needed with --data"), ((*OWN, "--columns", "a", "b"), "columns: line 1"),
    ((*OWN, "--rounds", "0"), "--rounds: expected an int >= 1"), ((*OWN, "--batch-size", "-1"), "--batch-size"),
    ((*OWN, "--eval-every", "0"), "--eval-every: expected"), ((*OWN, "--snapshot-every", "0"), "--snapshot-every"),
    ((*OWN, "--local-steps", "0"), "--local-steps"), ((*OWN, "--num-perturbations", "0"), "--num-perturbations"),
    ((*OWN, "--clients-per-round", "0"), "--clients-per-round"), ((*OWN, "--dropout", "2"), "--dropout"),
    ((*OWN, "--smoothing", "0"), "--smoothing"), ((*OWN, "--decay", "2"), "--decay"),
    ((*OWN, "--seed", "-1"), "--seed"), ((*OWN, "--alpha", "0"), "--alpha"),
    ((*OWN, "--learning-rate", "nan"), "--learning-rate"), ((*OWN, "--learning-rate", "-1"), "--learning-rate"),
    ((*OWN, "--method", "best"), "--method: expected one of"), ((*OWN, "--method", "rms"), "--learning-rate: none"),
    ((*OWN, "--compare", "--method", "rms", "--learning-rate", "1"), "--method: --compare runs"),
    ((*OWN, "--mesh", "900", "1"), "mesh: 900 x 1 devices"), ((*OWN, "--upper-directions", "9"), "--upper-directions"),
    ((*OWN, "--upper-directions", "1", "--upper-layers", "2"), "count: expected 1 to 1 of 2 layers"),
    ((*OWN, "--out", FILE), "what --data names, reviews.csv"), ((*OWN, "--out", ".."), "what --data names, reviews.csv"),
    ((*OWN, "--out", "model"), "what --model names, model"), ((*OWN, "--out", "notes.txt"), "--out: notes.txt is a file"),
    ((*OWN, "--data", "r\udce9.csv"), "--data: half of a pair of UTF-16, or bytes that are not UTF-8"),
])  # fmt: skip
def test_options(options: tuple[str, ...], said: str, place: Path):
    some = ("--clients", "9") if "--clients" not in options and "column" not in options else ()
    if {"docstrings", "column"} & set(options) or "--client-column" in options:
        some = ()
    assert said in refused("--data", FILE, *some, *options)


@pytest.mark.parametrize("options", [
    OWN, ("--verbalizer", "a", "b"), ("--columns", "a"), ("--prompt", "{a}"), ("--clients", "3"),
    ("--split", "iid"),
])  # fmt: skip
def test_options_that_would_be_passed_over(options: tuple[str, ...], place: Path):
    assert "--data" in refused(*options)  # without it the docstrings would be run


@pytest.mark.parametrize("rows, options, said", [
    ([row | {"mood": "up"} for row in REVIEWS], OWN, "--label: column 'mood' has one class only"),
    ([row | {"mood": f"m{i}"} for i, row in enumerate(REVIEWS)], OWN, "120 different values in 120 rows"),
    ([row | {"mood": ""} for row in REVIEWS], OWN, "no row of train has a label, column 'mood'"),
    ([row | {"review": " "} for row in REVIEWS], OWN, "no row of train has a text, column 'review'"),
    (REVIEWS[:2], OWN, "2 rows with labels are too few"),
    ([row | {"mood": "" if i < 30 else 2 * (i == 60) or i % 2} for i, row in enumerate(REVIEWS)],
     ("--task", "sst2", "--text", "review", "--label", "mood"), "other.csv: train, row 61: column 'mood'"),
    ([row | {"who": ""} for row in REVIEWS],
     (*OWN, "--split", "column", "--client-column", "who"), "column 'who' is empty in all rows"),
    ([row | {"review": "x"} for row in REVIEWS], ("--task", "lm", "--text", "review"), "no client has a text of two tokens"),
])  # fmt: skip
def test_data(rows: Any, options: tuple[str, ...], said: str, place: Path):
    csv(place / "other.csv", rows)
    assert said in refused("--data", "other.csv", *options)


@pytest.mark.parametrize("broken, said", [
    ("tokenizer.json", "tokenizer"), ("model.safetensors", "model.safetensors"), ("config.json", "config.json"),
])  # fmt: skip
def test_a_model_that_lacks_a_file(broken: str, said: str, place: Path, tiny: Path):
    (place / "model").unlink()
    shutil.copytree(tiny, place / "model")
    for name in {broken, "tokenizer_config.json" if broken == "tokenizer.json" else broken}:
        (place / "model" / name).unlink()
    assert said in refused("--data", FILE, *OWN, "--clients", "9")


def test_a_tokenizer_of_another_model(place: Path, tiny: Path):
    from transformers import OPTConfig

    from hiso_jax import models

    (place / "model").unlink()
    shutil.copytree(tiny, place / "model")
    config = OPTConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=80, word_embed_proj_dim=32,
    )  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), place / "model")
    assert "the model has 300 rows" in refused("--data", FILE, *OWN, "--clients", "9")


def test_a_file_of_numbers_for_weights(place: Path, capsys: pytest.CaptureFixture[str]):
    """Weights that overflow say so before a run, instead of an accuracy; notes come before that."""
    problem = digits.digits(5)
    broken = problem._replace(params=jax.tree.map(lambda x: x * np.nan, problem.params))
    out = place / "new[1]"
    options = digits.Options(out=out, rounds=2, clients=5, clients_per_round=2, delta=1e-6)
    from hiso_jax.train import job

    with pytest.raises(SystemExit) as end:
        job.run(options, broken, digits.LEARNING_RATES)
    assert end.value.code == 1 and not out.exists()
    assert "Note: --delta is used with --epsilon only" in capsys.readouterr().out


@pytest.mark.parametrize("options, said", [
    (("--method", "hizo"), "--method: expected one of"), ((), "--learning-rate: none was tuned for hiso"),
    (("--learning-rate", "1", "--clients-per-round", "41"), "at most 40, for there are 40 clients; got 41"),
    (("--learning-rate", "1", "--out", "."), "--out: expected a folder of its own"),
])  # fmt: skip
def test_options_are_looked_at_before_data_and_model(
    options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    from hiso_jax.train import job

    monkeypatch.setattr(sys, "argv", ["hiso digits", *options])
    with pytest.raises(SystemExit) as end:
        job.main(digits.Options, lambda _: pytest.fail("they were read"), {})
    assert end.value.code == 1 and said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("saved, said", [
    (None, "no run to resume"), ("", "not the options of a run"), ("[]", "not the options of a run"),
    ('{"job": "digits"}', "not the options of a run"),
    ('{"job": "digits", "options": {}, "learning_rates": {}}', "is a run of `hiso digits`"),
])  # fmt: skip
def test_runs_that_are_none(saved: str | None, said: str, tmp_path: Path):
    if saved is not None:
        (tmp_path / "options.json").write_text(saved)
    assert said in refuse("finetune", "--resume", str(tmp_path))


@dataclasses.dataclass(frozen=True)
class Elsewhere(digits.Options):
    """Options of a job with data and a model."""

    data: Path | None = None
    model: str | None = None


def test_options_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Absolute paths, infinity, tuples; data and model may be elsewhere when it goes on."""
    monkeypatch.chdir(csv(tmp_path / "a[1]" / "x.csv", REVIEWS).parent)
    given = Elsewhere(out=tmp_path / "run", alpha=float("inf"), mesh=(8, 1), data=Path("x.csv"),
                      model="org/name", learning_rate=0.5)  # fmt: skip
    given.out.mkdir()
    kept.write(given, {"hiso": 0.5}, {})
    json.loads((given.out / "options.json").read_text(), parse_constant=pytest.fail)
    monkeypatch.chdir(tmp_path)
    back = kept.settle(Elsewhere(resume=Path("run")))
    wanted = dataclasses.replace(
        given, data=tmp_path / "a[1]/x.csv", out=Path("run"), resume=Path("run")
    )
    assert back == wanted
    moved = kept.settle(Elsewhere(resume=Path("run"), data=Path("y.csv"), model="z"))
    assert moved == dataclasses.replace(wanted, data=Path("y.csv"), model="z")
    with pytest.raises(
        SystemExit, match="--rounds, --alpha cannot be given with it|--alpha, --rounds"
    ):
        kept.settle(Elsewhere(resume=Path("run"), rounds=3, alpha=2.0, data=Path("y.csv")))
    # Also one that has its default: it is not what the run was begun with.
    named = kept.given(["--resume", "run", f"--rounds={digits.Options().rounds}"])
    with pytest.raises(SystemExit, match="--rounds cannot be given with it"):
        kept.settle(Elsewhere(resume=Path("run")), named)
    assert kept.settle(Elsewhere(resume=Path("run")), kept.given(["--resume", "run"])) == wanted


JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
              st.floats(width=32).map(np.float32)),
    lambda own: st.one_of(st.lists(own, max_size=3), st.dictionaries(st.text(), own, max_size=3)),
    max_leaves=10,
)  # fmt: skip


@settings(deadline=None)
@given(JSONS)
def test_json_is_what_every_reader_takes(content: Any):
    json.loads(report.dumps(content), parse_constant=pytest.fail)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1))
def test_paths_are_printed_as_they_are(name: str):
    from rich.console import Console

    console = Console(emoji=False, highlight=False, width=20, force_terminal=False, record=True)
    before, report.console = report.console, console
    try:
        with console.capture() as got:
            report.say("In ", name, "/")
            report.fail(ValueError(f"{name}:\n no"))
    finally:
        report.console = before
    assert got.get() == f"In {name}/\n{name}: no\n"


def test_labels_are_shown_with_words_and_counts(place: Path):
    rows = [
        dict(r, mood={"up": 10, "down": 9}[r["mood"]] if i % 10 else "")
        for i, r in enumerate(REVIEWS)
    ]
    csv(place / "train.csv", rows)
    csv(place / "test.csv", [dict(rows[1], mood=11), *rows[1:9]])
    (place / FILE).unlink()
    built = finetune.build(finetune.Options(
        model="model", data=place, text="review", label="mood", clients=3, length=24,
        verbalizer=("down", "up", "great"),
    ))  # fmt: skip
    table = report.counts(built)
    assert [(row["label"], row["word"]) for row in table] == [
        ("9", "down"),
        ("10", "up"),
        ("11", "great"),
    ]
    total = [sum(row[name] for row in table) for name in ("train", "dev", "test")]
    assert total == [89, 19, 9] and table[2]["train"] == 0
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
        labels = {n: built.clients[n]["label"] for n in built.clients.names}
        report.draw_split(labels, built.clients.sizes, place / "split.png", built.classes)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["label 9 down", "label 10 up"]
    assert "train: 12 of 120 rows have no mood, left out" in built.notes
    assert built.name.startswith(place.name) and "docstring" not in built.name
    assert TASKS["sst2"].classes == (0, 1)


def test_examples_are_shown_once():
    task = Task("{text}", label="y", verbalizer=("bad", "good"))
    rows = [{"text": f"t{i}", "y": y} for i, y in enumerate((0, 0, 1, 0, 1))]
    shown = text_problem._of_different_labels(task, rows, 4)
    assert [row["text"] for row in shown] == ["t0", "t2", "t1", "t3"]


def test_what_has_no_effect_is_said():
    given: Any = dict(data=Path("x"), text="t", split="iid", alpha=0.3, lora_rank=2)
    assert notes.not_used(finetune.Options(**given)) == [
        "--alpha is used with --split dirichlet only", "--lora-rank is used with --train lora only",
    ]  # fmt: skip
    assert notes.not_used(finetune.Options(alpha=0.3, train="lora", lora_rank=2)) == []
    for options, names in (
        (digits.Options(delta=1e-6, upper_layers=(2,), alpha=0.3, clients=5), "upper-layers delta"),
        (finetune.Options(clients=5, split="column", data=Path("x")), "clients"),
        (images.Options(lora_rank=3, lora_alpha=5.0), "lora-rank lora-alpha"),
        (llm.Options(beside="fedavg", compare=True), "beside"),
        (llm.Options(beside="fedavg", upper_directions=(3,), upper_layers=(2,)), ""),
    ):
        assert [note.split()[0][2:] for note in notes.not_used(options)] == names.split()
    assert len(notes.not_used_by_encoders(finetune.Options(answers=5, room=16))) == 2


def test_many_clients_of_a_column_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch):
    """By what is looked at: the column's rows are laid out once, not once for every client."""
    rows = [{"text": "a", "who": f"u{i}"} for i in range(500)]
    real, large = np.array, []

    def counted(values: Any, *args: Any, **options: Any) -> np.ndarray:
        found = real(values, *args, **options)
        large.extend([1] * (found.size >= 500))
        return found

    monkeypatch.setattr(np, "array", counted)
    options = finetune.Options(split="column", client_column="who")
    own, notes = finetune._clients_of(options, TASKS["sst2"], rows)
    assert len(own) == 500 and not notes and len(large) <= 3
