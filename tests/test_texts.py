"""Prompted tasks: files to rows, rows to clients, prompts to arrays; and a job end to end."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hiso_jax as hj
from hiso_jax import federation, models
from hiso_jax._engine import trees
from hiso_jax.tasks import data, problem, splits, text, text_problem
from hiso_jax.tasks.prompts import TASKS, Task
from hiso_jax.train import finetune, methods
from tests.helpers import REVIEWS as ROWS
from tests.helpers import finish, here, start, tiny_roberta


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 300), clients=st.integers(1, 40), seed=st.integers(0, 9),
       alpha=st.sampled_from([0.01, 1.0, 100.0]))  # fmt: skip
def test_every_split_is_a_partition(count: int, clients: int, seed: int, alpha: float):
    labels = np.random.default_rng(seed).integers(0, 3, count)
    makers = [lambda: splits.iid(count, clients, seed),
              lambda: splits.dirichlet(labels, clients, alpha, seed),
              lambda: splits.by_size(count, clients, 2.0, seed)]  # fmt: skip
    for make in makers:
        if count < clients:
            with pytest.raises(ValueError, match="clients: expected at most"):
                make()
            continue
        parts, again = make(), make()
        assert len(parts) == clients and all(len(part) for part in parts)
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_dirichlet_is_as_alike_as_alpha_says():
    labels = np.random.default_rng(0).integers(0, 2, 20_000)
    spread = {}
    for alpha in (0.1, 1.0, 1000.0):
        parts = splits.dirichlet(labels, 50, alpha, 1)
        spread[alpha] = np.std([labels[part].mean() for part in parts])
    assert spread[0.1] > spread[1.0] > 5 * spread[1000.0] and spread[1000.0] < 0.05


def test_natural_split():
    parts = splits.natural([row["who"] for row in ROWS])
    assert list(parts) == ["w0", "w1", "w2", "w3"]
    assert all(ROWS[i]["who"] == name for name, part in parts.items() for i in part)


def write(path: Path, rows: data.Rows) -> Path:
    import datasets

    table = datasets.Dataset.from_list(rows)
    if path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OWN = Task("{review}\nmood:", label="mood", verbalizer=("down", "up"), values=("down", "up"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_of_all_kinds(suffix: str, tmp_path: Path):
    path = write(tmp_path / f"reviews{suffix}", ROWS)
    assert data.read_file(path) == ROWS
    parts = data.load(OWN, path)
    assert {name: len(rows) for name, rows in parts.items()} == dict(train=84, dev=18, test=18)
    whole = [row["review"] for rows in parts.values() for row in rows]
    assert sorted(whole) == sorted(row["review"] for row in ROWS)
    for name in ("train", "dev"):
        write(tmp_path / f"{name}{suffix}", ROWS[:20] if name == "dev" else ROWS[20:])
    path.unlink()
    parts = data.load(OWN, tmp_path)  # no test split: dev is reported, train gives the dev
    assert parts["test"] == ROWS[:20] and len(parts["train"]) + len(parts["dev"]) == 100
    with pytest.raises(ValueError, match=r"train lacks columns \['sentence', 'label'\]"):
        data.load(TASKS["sst2"], tmp_path)


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such file"):
        data.read_file(tmp_path / "nowhere.csv")
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(ValueError, match="expected a suffix of"):
        data.read_file(tmp_path / "a.xls")
    with pytest.raises(FileNotFoundError, match="expected a file train"):
        data.load(OWN, tmp_path)
    with pytest.raises(ValueError, match="column 'mood': expected one of"):
        OWN.label_of({"mood": "sideways"})


def test_squad_files(tmp_path: Path):
    qa = {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], "id": "1"}
    article = {"title": "T", "paragraphs": [{"context": "Ann is here.", "qas": [qa]}]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [article]}))
    (row,) = data.read_file(tmp_path / "a.json")
    task = TASKS["squad"]
    assert task.answers(row) == ["Ann"]
    assert task.read(row) == "Title: T\nContext: Ann is here.\nQuestion: Who?\nAnswer:"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_complete(name: str):
    task = TASKS[name]
    row: dict[str, Any] = {column: f"<{column}>" for column in task.columns}
    shown = task.read(row)
    assert all(f"<{column}>" in shown for column in task.columns)
    if task.verbalizer is None:
        assert task.answers({task.label: {"text": ["yes", "no"]}}) == ["yes", "no"]
        return
    for number, word in enumerate(task.verbalizer):
        for value in (
            {number, str(number)} if task.values is None else {number, task.values[number]}
        ):
            assert task.answers(row | {task.label: value}) == [word]


def test_prompts_end_in_the_last_column(tokenizer: Any):
    arrays = text.words(OWN, tokenizer, ROWS, 12)
    assert arrays["input_ids"].shape == (120, 12) and arrays["attention_mask"].max() == 1
    np.testing.assert_array_equal(arrays["label"], [OWN.label_of(row) for row in ROWS])
    for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True):
        assert tokenizer.decode(ids[mask > 0]).endswith("mood:")  # cut at the beginning
        assert (np.diff(mask) >= 0).all()  # padded on the left
    shared, firsts = text.word_tokens(OWN, tokenizer)
    assert shared == [] and len(set(firsts.tolist())) == 2
    for first, word in zip(firsts, OWN.verbalizer or (), strict=True):
        assert f" {word}".startswith(tokenizer.decode([first]))
    with pytest.raises(ValueError, match="not told apart"):
        text.word_tokens(OWN._replace(verbalizer=("up", "up")), tokenizer)
    alike = OWN._replace(verbalizer=("upx", "upy"))  # they share their first tokens
    shared, firsts = text.word_tokens(alike, tokenizer)
    assert tokenizer.decode(shared) == " up" and len(set(firsts.tolist())) == 2


@pytest.mark.parametrize("prompt", ["Review: {review}", "{review}"])
def test_white_space_at_the_end_of_a_text_moves_no_word(prompt: str, tokenizer: Any):
    """Or the words would be measured without the gap before them, at one row or at all."""
    task = OWN._replace(prompt=prompt)
    shared, firsts = text.word_tokens(task, tokenizer)
    for row in ROWS[:5]:
        for word, first in zip(OWN.verbalizer or (), firsts.tolist(), strict=True):
            own = text._pair(tokenizer, task.read(row), word)[1]
            assert own[: len(shared) + 1] == [*shared, first]  # as it stands behind a text
        others = [row | {"review": row["review"] + end} for end in (" ", "\n", "\u3000\r\n")]
        many = [row, *others]
        for arrays in (
            text.words(task, tokenizer, many, 40),
            text.prompts(task, tokenizer, many, 40),
        ):
            assert len(np.unique(arrays["input_ids"], axis=0)) == 1
        told = task._replace(verbalizer=None, metric="squad")
        targets = text.answers(told, tokenizer, many, 40, room=6)
        assert len(np.unique(targets["input_ids"], axis=0)) == 1


def test_answers_are_targets(tokenizer: Any):
    task = Task("{review} mood:", label="mood", metric="squad")
    arrays = text.answers(task, tokenizer, ROWS, 40, room=6)
    for row, ids, target in zip(ROWS, arrays["input_ids"], arrays["target"], strict=True):
        assert tokenizer.decode(ids[target > 0]) == f" {row['mood']}</s>"
        assert target[-1] == 1 and not target[:-6].any()
    pieces = text.chunks(["good fine lovely film number 7" * 3, "bad"], tokenizer, 8)
    assert (pieces["target"].sum(1) == pieces["attention_mask"].sum(1) - 1).all()


@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_trim_keeps_every_token_and_few_lengths(sizes: list[int]):
    batch = text.pad([range(1, n + 1) for n in sizes], 100, 0) | {"label": np.arange(len(sizes))}
    cut = text.trim(batch)
    length = cut["input_ids"].shape[1]
    assert length in {16, 24, 32, 48, 64, 96, 100} and length >= max(sizes)
    assert length == 16 or length * 2 / 3 < max(sizes) or length == 100
    for n, ids in zip(sizes, cut["input_ids"], strict=True):
        assert ids[-n:].tolist() == list(range(1, n + 1)) and not ids[: length - n].any()
    assert cut["label"] is batch["label"]


def test_padding_that_no_text_needs_is_cut():
    """Of encoders, at either side; a text that takes all of it keeps all of it."""
    mask = np.zeros((3, 128), np.int32)
    mask[0, :19], mask[1, :5] = 1, 1
    parts = {"train": {"input_ids": mask * 7, "attention_mask": mask, "label": np.arange(3)}}
    parts["dev"] = {name: column[1:] for name, column in parts["train"].items()}
    cut = text_problem._tight(parts)
    assert {part["attention_mask"].shape[1] for part in cut.values()} == {24}
    for name, part in cut.items():
        assert (part["attention_mask"].sum(1) == parts[name]["attention_mask"].sum(1)).all()
        assert part["input_ids"].shape[1] == 24 and part["label"] is parts[name]["label"]
    left = {n: {"attention_mask": p["attention_mask"][:, ::-1]} for n, p in parts.items()}
    assert text_problem._tight(left)["dev"]["attention_mask"].shape == (2, 128)


def test_f1_and_perplexity_are_those_of_the_libraries():
    from sklearn.metrics import confusion_matrix, f1_score

    rng = np.random.default_rng(0)
    label, guess = rng.integers(0, 3, (2, 200))
    loss_fn, score = problem.classification(lambda params, batch: batch["logits"])
    batch = {"logits": np.eye(3, dtype=np.float32)[guess], "label": label.astype(np.int32),
             "weight": np.ones(200, np.float32)}  # fmt: skip
    sums = score({}, batch)
    np.testing.assert_array_equal(sums["confusion"], confusion_matrix(label, guess))
    fields = dict.fromkeys(problem.Problem._fields) | {"metric": "f1"}
    figure = problem.Problem(**fields).metric_value(sums)[1]  # pyright: ignore
    assert figure == pytest.approx(f1_score(label, guess, average="macro"))
    assert float(loss_fn({}, batch)) == pytest.approx(float(sums["loss"] / sums["count"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("train", [
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("norms", "biases")),
    "lora", "last-1", "prefix-3",
])  # fmt: skip
def test_subsets_move_nothing_else(train: str, tiny: Path, tmp_path: Path):
    """Two rounds of a batch's own scalars: what is not trained stays; what is saved loads back."""
    built = finetune.build(finetune.Options(
        model=str(tiny), data=write(tmp_path / "reviews.csv", ROWS), text="review", label="mood",
        clients=3, train=train, lora_rank=2, length=24,
    ))  # fmt: skip
    alg = hj.decomfl(built.loss_fn, 1e-2, trainable=built.trainable)
    state = alg.init(built.params, jax.random.key(0))
    batch = built.prepare(built.clients.batches(built.clients.names[:2], 0, 4))
    for _ in range(2):
        state, metrics = jax.jit(alg.round)(state, batch)
    assert np.isfinite(metrics.loss) and np.abs(metrics.record).max() > 0
    built.save(tmp_path, state.params)
    tuned, base = (models.from_pretrained(f, progress=False) for f in (tmp_path / "model", tiny))
    pairs = zip(trees.named(tuned.params).items(), trees.named(base.params).values(), strict=True)
    moved = {name: np.asarray(a != b) for (name, a), b in pairs}
    wanted = {
        "norms": lambda n: "norm" in n, "biases": lambda n: n.endswith("bias"),
        "lora": lambda n: n.endswith(("q_proj/kernel", "v_proj/kernel")),
        "last-1": lambda n: "/layers/" in n, "prefix-3": lambda n: False,
    }[train]  # fmt: skip
    assert all(moved[name].any() == wanted(name) for name in moved)
    if train == "last-1":
        assert not any(moved[name][0].any() for name in moved if "/layers/" in name)
    if train == "lora":
        assert sum(x.size for x in alg.trainable(state.params).values()) == 2 * 2 * 2 * (32 + 32)
    score = jax.jit(built.score)
    before, after = (federation.evaluate(score, p, built.dev, 8, built.prepare)
                     for p in (built.params, state.params))  # fmt: skip
    assert before["loss"] != after["loss"]


def test_a_pass_that_starts_at_the_last_layer(tiny: Path, tmp_path: Path):
    """With activations of the parameters as they were, the loss of parameters moved above them."""
    built = finetune.build(finetune.Options(
        model=str(tiny), data=write(tmp_path / "reviews.csv", ROWS), text="review", label="mood",
        clients=3, length=24,
    ))  # fmt: skip
    assert built.upper is not None
    cut = built.upper(1)
    raw = built.clients.batches(built.clients.names[:1], 0, 8)
    batch = built.prepare({k: v[0, 0] for k, v in raw.items()})
    leaves, rng = trees.named(built.params), np.random.default_rng(0)
    push = {
        n: leaves[n].at[row:].add(rng.normal(0, 0.3, leaves[n][row:].shape))
        for n, row in cut.leaves.items()
    }
    moved, loss_fn = trees.merge(built.params, push), jax.jit(built.loss_fn)
    kept, (before, whole) = (
        jax.jit(cut.trunk)(built.params, batch),
        (loss_fn(params, batch) for params in (built.params, moved)),
    )
    np.testing.assert_allclose(jax.jit(cut.head)(moved, kept), whole, rtol=1e-5)
    assert abs(float(whole - before)) > 1e-3
    assert 0.4 < methods.share(built, 1) < 0.6  # one layer of two


@pytest.mark.parametrize("options", [
    ("--text", "review", "--label", "mood", "--verbalizer", "bad", "good"),
    pytest.param(("--text", "review", "--label", "mood", "--train", "lora"),
                 marks=pytest.mark.slow),
    pytest.param(("--text", "review", "--label", "mood", "--train", "prefix-3"),
                 marks=pytest.mark.slow),
    pytest.param(("--task", "lm", "--text", "review", "--split", "column",
                  "--client-column", "who"), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_decoder_is_fine_tuned_shipped_and_loaded(options: Any, tiny: Path, tmp_path: Path):
    """The way of a new user with a checkpoint and a file."""
    reviews, run, out = write(tmp_path / "reviews.csv", ROWS), tmp_path / "run", tmp_path / "out"
    here(
        "finetune", "--model", str(tiny), "--data", str(reviews), *options, "--clients", "4",
        "--clients-per-round", "3", "--rounds", "25", "--learning-rate", "3e-3", "--out", str(run),
    )  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 25 and summary["loss"] < summary["loss_before"]
    assert {"split.png", "curve.png", "ledger.safetensors"} <= {p.name for p in run.iterdir()}
    output = here("replay", str(run / "ledger.safetensors"), str(tiny), str(out))
    assert f"digest {summary['digest']}: equal to the ledger's" in output
    ours = {p.name: p.read_bytes() for p in (run / "model").glob("*.safetensors")}
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == ours
    names = ("config.json", "tokenizer.json")
    assert all((out / n).read_bytes() == (tiny / n).read_bytes() for n in names)


@pytest.mark.slow
def test_a_decoder_made_on_the_spot(tmp_path: Path):
    """Pretrained, then fine-tuned on a prompted task by its folder: two commands."""
    folder, run = tmp_path / "opt", tmp_path / "run"
    finish(
        start("pretrain", "--steps", "60", "--width", "64", "--layers", "2", "--out", str(folder))
    )
    made = json.loads((folder / "pretrain.json").read_text())
    assert made["perplexity"] < 0.5 * made["perplexity_before"]
    finish(start("finetune", "--model", str(folder), "--rounds", "5", "--out", str(run)))
    assert json.loads((run / "summary.json").read_text())["clients"] > 60


@pytest.mark.slow
@pytest.mark.ci
def test_an_encoder_tells_words_by_its_mask(tmp_path: Path):
    """RoBERTa with its own head: the word in the place of the mask, padded on the right."""
    from transformers import AutoTokenizer

    folder = tiny_roberta(tmp_path / "roberta")
    own = OWN._replace(prompt="{review} It was", verbalizer=("bad", "good"))
    arrays = text.masked(own, AutoTokenizer.from_pretrained(folder), ROWS, 14)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for ids, mask, place in zip(
        *(arrays[k] for k in ("input_ids", "attention_mask", "place")), strict=True
    ):
        assert ids[place] == tokenizer.mask_token_id and mask[place] == 1
        assert tokenizer.decode(ids[mask > 0]).endswith("It was <mask>.</s>") and ids[0] == 0
    trimmed = text.trim(arrays, smallest=4)
    assert trimmed["input_ids"].shape[1] >= arrays["attention_mask"].sum(1).max()

    built = finetune.build(finetune.Options(
        model=str(folder), data=write(tmp_path / "reviews.csv", ROWS), text="review", label="mood",
        prompt="{review} It was", verbalizer=("bad", "good"), clients=3, length=24,
    ))  # fmt: skip
    alg = hj.decomfl(built.loss_fn, 2e-3, distribution="rademacher")
    score, state = jax.jit(built.score), alg.init(built.params, jax.random.key(0))
    before = federation.evaluate(score, state.params, built.test, 8, built.prepare)
    for report in federation.run(
        alg, state, built.clients, rounds=30, clients_per_round=3, batch_size=8,
        prepare=built.prepare,
    ):  # fmt: skip
        state = report.state
    after = federation.evaluate(score, state.params, built.test, 8, built.prepare)
    assert after["loss"] < 0.9 * before["loss"]
