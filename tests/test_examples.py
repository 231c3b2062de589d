"""What models tell of examples, for clients that choose, and the noise that choosing is to reduce."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments import prompts
from experiments import selection as script
from hiso_jax import federation
from hiso_jax.federation import Select
from hiso_jax.tasks import problem as problems
from hiso_jax.train import digits, finetune
from hiso_jax.train import selecting as jobs
from tests.helpers import REVIEWS

RNG = np.random.default_rng(0)
PROBLEM = digits.digits(5)


def test_examples_of_the_digits_are_what_the_loss_is_made_of():
    batch = {k: v[:6] for k, v in PROBLEM.clients.columns.items()}
    batch |= {"weight": np.array([1, 1, 1, 0, 1, 1], np.float32)}
    seen = jax.jit(PROBLEM.examples)(PROBLEM.params, batch)
    loss = PROBLEM.loss_fn(PROBLEM.params, batch)
    np.testing.assert_allclose(loss, np.average(seen["loss"], weights=batch["weight"]), rtol=1e-5)
    kept = PROBLEM.upper(1).trunk(PROBLEM.params, batch)["stream"]
    np.testing.assert_allclose(seen["features"], kept.reshape(6, -1), rtol=1e-5, atol=1e-6)
    w = np.array([2, 0.5, 1, 9, 1, 1], np.float32)
    weighted = PROBLEM.loss_fn(PROBLEM.params, batch | {"importance": w})
    np.testing.assert_allclose(weighted, (seen["loss"] * w * batch["weight"]).sum() / 5, rtol=1e-5)


def test_examples_of_a_text_are_what_its_loss_is_made_of():
    """A language model of one matrix: per text, over its targets."""
    table = jnp.asarray(RNG.normal(size=(7, 7)), jnp.float32)
    hidden = lambda params, batch: params[batch["input_ids"]]  # noqa: E731
    loss_fn, _, seen_of = problems.language(hidden, lambda params, x: x)
    ids = RNG.integers(0, 7, (4, 6))
    batch = {"input_ids": ids, "attention_mask": np.ones((4, 6), np.int32),
             "target": np.ones((4, 6), np.float32), "weight": np.ones(4, np.float32)}  # fmt: skip
    loss_fn, seen = jax.jit(loss_fn), jax.jit(seen_of)(table, batch)
    np.testing.assert_allclose(loss_fn(table, batch), seen["loss"].mean(), rtol=1e-5)
    np.testing.assert_allclose(seen["features"], table[ids].mean(1), rtol=1e-5)
    w = np.array([2, 0, 1, 0.5], np.float32)
    got = loss_fn(table, batch | {"importance": w})
    np.testing.assert_allclose(got, (np.asarray(seen["loss"]) * w).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    "own", [dict(label="mood", split="iid"), dict(task="lm")], ids=["words", "lm"]
)
def test_examples_of_a_decoder_are_what_its_loss_is_made_of(
    own: dict[str, Any], tiny: Path, tmp_path: Path
):
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    given = finetune.Options(model=str(tiny), data=data, text="review", clients=3, length=24, **own)
    problem = finetune.build(given)
    few = {k: v[:6] for k, v in problem.clients.columns.items()}
    batch = problem.prepare(few | {"weight": np.array([1, 1, 0, 1, 1, 1], np.float32)})
    seen = jax.jit(problem.examples)(problem.params, batch)
    assert seen["features"].shape == (6, 32) and np.isfinite(seen["features"]).all()
    count = batch["target"].sum(1) if "target" in batch else np.ones(6)
    wanted = np.average(seen["loss"], weights=batch["weight"] * count)
    got = jax.jit(problem.loss_fn)(problem.params, batch)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    chosen = jobs.settle(finetune.Options(select="vecaf(steps=2)", budget=0.5), problem).clients
    chosen.choose(problem.params, chosen.names[:2], 0)
    assert chosen.batches(chosen.names[:2], 0, 4)["input_ids"].shape[:3] == (2, 1, 4)
    if own.get("task") == "lm":
        with pytest.raises(ValueError, match="select: entropy needs entropy of examples"):
            jobs.settle(finetune.Options(select="entropy"), problem)
        with pytest.raises(ValueError, match="--select: balanced goes by classes"):
            jobs.settle(finetune.Options(select="balanced"), problem)


def test_prompts_are_scored_as_the_job_does(tiny: Path, tmp_path: Path):
    """`experiments.prompts` on training examples of a task: loss and accuracy before training."""
    lines = "".join(f"{row['review']}\t{i % 2}\n" for i, row in enumerate(REVIEWS))
    (data := tmp_path / "data").mkdir()
    for part in ("train", "dev", "test"):
        (data / f"{part}.tsv").write_text("sentence\tlabel\n" + lines)
    told = [{"prompt": prompt, "verbalizer": ["down", "up"]}
            for prompt in ("{sentence} It was", "[INST] {sentence} [/INST] It was")]  # fmt: skip
    file = tmp_path / "of.toml"
    file.write_text("".join(
        f"[[candidate]]\nprompt = {json.dumps(t['prompt'])}\nverbalizer = {t['verbalizer']}\n"
        for t in told
    ))  # fmt: skip
    found = prompts.run(prompts.Options(file, data, model=str(tiny), length=24))
    assert found == sorted(found, key=lambda row: row["loss"])
    assert {row["prompt"] for row in found} == {t["prompt"] for t in told}
    (shown := Console(file=io.StringIO(), width=200)).print(prompts.table(found))
    assert "[INST] {sentence} [/INST] It was" in shown.file.getvalue()  # pyright: ignore
    own = finetune.Options(
        model=str(tiny), data=data, task="sst2", clients=2, split="iid", length=24,
        prompt=found[0]["prompt"], verbalizer=("down", "up"),
    )  # fmt: skip
    problem = finetune.build(own)
    sums = federation.evaluate(
        jax.jit(problem.score), problem.params, problem.dev, 256, problem.prepare
    )
    loss, accuracy = problem.metric_value(sums)
    np.testing.assert_allclose(
        (found[0]["loss"], found[0]["accuracy"]), (loss, accuracy), rtol=1e-5
    )


def test_noise_of_a_round_is_what_draws_have():
    """`experiments.selection`, against a hundred thousand rounds drawn."""
    rng, of, clients, batch = np.random.default_rng(0), 5, 2, 3
    scalars = [rng.normal(i, 1 + i, (2, 4 + 2 * i)) for i in range(of)]
    found = script.noise(scalars, np.full(of, 1 / of), clients, of, batch)
    rounds = []
    for own in scalars:
        order = rng.random((100_000, own.shape[1])).argsort(1)[:, :batch]
        rounds.append(own[:, order].mean(-1))  # [2, rounds]
    who = rng.random((100_000, of)).argsort(1)[:, :clients]
    drawn = np.stack(rounds)[who.T, :, np.arange(100_000)].mean(0)  # [rounds, 2]
    mean = np.mean([own.mean(1) for own in scalars], 0)
    np.testing.assert_allclose(found["mean_square"], (mean**2).mean())
    total = found["within"] + found["between"]
    np.testing.assert_allclose(total, ((drawn - mean) ** 2).mean(), rtol=0.03)
    off = np.stack([own.mean(1) for own in scalars])[who].mean(1) - mean
    np.testing.assert_allclose(found["between"], (off**2).mean(), rtol=0.03)


def test_a_uniform_subset_has_the_error_of_one():
    data = [{"x": np.zeros((9 + 4 * i, 3), np.float32)} for i in range(4)]
    scalars = [RNG.normal(size=(20, len(columns["x"]))) for columns in data]
    error = lambda select: script.errors(select, seen, data, scalars, draws=40)  # noqa: E731
    uniform = Select("uniform", None, 0.4)
    seen = [{} for _ in data]
    assert abs(error(uniform) - 1) < 0.2
    # Whoever takes the highest of one direction is far off along it.
    worst = Select("loss", lambda params, batch: {}, 0.4)
    scalars = [x[:1] for x in scalars]
    seen = [{"loss": x[0].astype(np.float32)} for x in scalars]
    assert error(worst) > 3
