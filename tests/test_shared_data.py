"""Real data and a real pretrained decoder, which lie beside the project on some machines."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import mnist, plays
from hiso_jax import federation, models
from hiso_jax.tasks import data
from hiso_jax.tasks.prompts import TASKS
from hiso_jax.train import compare, finetune
from tests.helpers import finish, start

SHARED = Path(__file__).parents[2] / "shared" / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"real data: {name} is not beside the project")
    return SHARED / name


STORY = "Once upon a time, there was a little girl named Lily. She"


def test_tinystories_equals_torch():
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("tinystories-656k")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, tokenizer = models.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [STORY, "The dog ran to the big tree and"]
    tokens = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    tokens.pop("token_type_ids", None)
    inputs = {k: v.numpy().astype(np.int32) for k, v in tokens.items()}
    with torch.no_grad():
        wanted = theirs(**tokens).logits.numpy()
        story = theirs.generate(**tokens, max_new_tokens=80, do_sample=False).numpy()
    got = np.asarray(ours.apply(ours.params, **inputs))
    real = inputs["attention_mask"][..., None] > 0
    # Its matrices are large: logits reach 30, so the tolerance is relative to that.
    assert np.abs((got - wanted) * real).max() < 1e-5 * np.abs(wanted * real).max()
    length = inputs["input_ids"].shape[1]
    ours_story = np.asarray(
        jax.jit(ours.generate, static_argnums=3)(
            ours.params, *inputs.values(), 80, jnp.array([2]), 2
        )
    )
    new = story[:, length:]
    np.testing.assert_array_equal(ours_story[:, : new.shape[1]], new)
    assert len(tokenizer.decode(ours_story[0]).split()) > 40


@pytest.mark.slow
def test_language_model_with_speakers_as_clients(tmp_path: Path):
    """HiSo and first order on the same clients; zeroth order helps, and helps less."""
    rows = plays.speeches((shared("tinyshakespeare") / "input.txt").read_text())
    assert len(rows) > 7000 and {"ROMEO", "HAMLET"} & {row["client"] for row in rows} == {"ROMEO"}
    source, run = tmp_path / "plays.jsonl", tmp_path / "run"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[:1500]))
    arguments = dict(
        model=str(shared("tinystories-656k")), task="lm", data=source, split="column",
        length=48, batch_size=8, rounds=30,
    )  # fmt: skip
    flags = [word for k, v in arguments.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    finish(start("finetune", *flags, "--learning-rate", "2e-3", "--out", str(run)))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["perplexity"] < 0.99 * summary["perplexity_before"]
    assert summary["clients"] > 50

    built = finetune.build(finetune.Options(**arguments))
    tx, params = optax.adam(1e-3), built.params
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        losses = lambda p: jax.vmap(built.loss_fn, (None, 0))(p, batch).mean()  # noqa: E731
        updates, state = tx.update(jax.grad(losses)(params), state, params)
        return optax.apply_updates(params, updates), state

    for round in range(30):
        names = built.clients.sample(8, round, sampling="size")
        batch = {k: v[:, 0] for k, v in built.clients.batches(names, round, 8).items()}
        params, state = step(params, state, batch)
    score = jax.jit(built.score)
    first_order = federation.evaluate(score, params, built.test, 64, built.prepare)
    adam = built.metric_value(first_order)[1]
    before, after = summary["perplexity_before"], summary["perplexity"]
    print(f"perplexity {before:.1f}; after 30 rounds HiSo {after:.1f}, Adam {adam:.1f}")
    assert adam < 0.97 * after


@pytest.mark.parametrize("task, folder, options, train", [
    ("sst2", "sst2", ("sentence", "label"), 5882), ("rte", "rte", (), 2117),
    ("squad", "xquad-en/xquad.en.json", (), 834),
])  # fmt: skip
def test_real_files(task: str, folder: str, options: tuple[str, ...], train: int):
    parts = data.load(TASKS[task], shared(folder), options)
    sizes = {name: len(rows) for name, rows in parts.items()}
    assert abs(sizes["train"] - train) < 1200 and min(sizes.values()) > 150
    row = parts["train"][0]
    assert TASKS[task].read(row) and TASKS[task].answers(row)
    if TASKS[task].verbalizer:
        labels = [TASKS[task].label_of(r) for rows in parts.values() for r in rows]
        assert 0.4 < np.mean(labels) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("task, folder, options", [
    ("sst2", "sst2", ("--columns", "sentence", "label")),
    ("squad", "xquad-en/xquad.en.json", ("--length", "160")),
    ("rte", "rte", ("--train", "norms")),
])  # fmt: skip
def test_a_decoder_on_real_tasks(task: str, folder: str, options: tuple[str, ...], tmp_path: Path):
    model, files = shared("tinystories-656k"), shared(folder)
    finish(start(
        "finetune", "--model", str(model), "--task", task, "--data", str(files), *options,
        "--rounds", "3", "--clients-per-round", "2", "--learning-rate", "1e-3",
        "--out", str(tmp_path / "run"),
    ))  # fmt: skip
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["rounds"] == 3 and np.isfinite(summary["loss"])


@pytest.mark.slow
@pytest.mark.ci
def test_mnist_over_a_hundred_clients():
    """As the paper splits it: unlike shares of labels, ten clients a round, it learns."""
    options = mnist.Options(data=shared("mnist"), method="rms", learning_rate=0.064, rounds=60,
                            num_perturbations=10, batch_size=8, eval_every=60)  # fmt: skip
    problem = mnist.build(options)
    assert sum(x.size for x in jax.tree.leaves(problem.params)) == 29_083
    assert len(problem.clients) == 100 and sum(problem.clients.sizes.values()) == 58_000
    assert (len(problem.dev["label"]), len(problem.test["label"])) == (2_000, 10_000)
    shares = [np.bincount(problem.clients[n]["label"], minlength=10).max()
              / len(problem.clients[n]["label"]) for n in problem.clients.names]  # fmt: skip
    assert np.mean(shares) > 0.25  # 0.1 would be equal shares
    equal = mnist.build(mnist.Options(data=shared("mnist"), alpha=float("inf")))
    assert max(equal.clients.sizes.values()) < 800
    row = compare.one("mnist", options)
    assert row["passes_per_round"] == 20 and row["bytes_per_round"] == 40
    assert row["test"] > 0.3  # chance is 0.1
