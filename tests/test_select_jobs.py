"""Jobs with --select: bits of runs that crash, costs, refusals at the door, what each task tells of an example."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax.models import adapters
from hiso_jax.tasks import problem as problems
from hiso_jax.train import digits, finetune, job, report
from hiso_jax.train import selecting as jobs
from tests.helpers import REVIEWS, outcome, refuse

# Jobs: the programs are those of test_crashes.
OPTIONS: dict[str, Any] = dict(rounds=7, clients=5, clients_per_round=2, eval_every=3, renew=3,
                               snapshot_every=2, dropout=0.5, select="vecaf(steps=3)", budget=0.3)  # fmt: skip
PROBLEM = digits.digits(5)


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw", "draw_split"):
            patch.setattr(report, name, lambda *_: None)
        build, built = job.algorithm, {}
        # One program for all runs of a method and as many rounds.
        patch.setattr(job, "algorithm", lambda options, *rest: built.setdefault(
            (options.method, options.rounds), build(options, *rest)))  # fmt: skip
        yield


def run(out: Path, **options: Any) -> int:
    try:
        given = digits.Options(out=out, **OPTIONS | options)
        job.run(given, PROBLEM, digits.LEARNING_RATES | {"fedavg": 0.1})
    except SystemExit as end:
        return int(end.code or 0)
    return 0


class Crash(BaseException):
    """What nothing in a job handles."""


@pytest.mark.parametrize("method", ["hiso", "fedavg"])
def test_a_crashed_job_goes_on_to_the_same_bits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Within a period and where one begins; a ledger leads to the same choice without its file."""
    assert run(tmp_path / "whole", method=method) == 0
    said = " ".join(capsys.readouterr().out.split())
    kept = sum(int(0.3 * n + 0.5) for n in PROBLEM.clients.sizes.values())
    assert f"learn from {kept} of 1,257 examples, by vecaf(steps=3), anew every 3 rounds" in said
    wanted = outcome(tmp_path / "whole")
    assert wanted["select"]["method"] == "vecaf" and wanted["look_passes_per_round"] > 0
    real, crashed, when = jobs.keep, set(), {2, 4, 5}

    def keep(options: Any, problem: Any, done: int) -> None:
        if done in crashed or done not in when:
            return real(options, problem, done)
        crashed.add(done)
        if done % 2:
            real(options, problem, done)
        raise Crash

    monkeypatch.setattr(jobs, "keep", keep)
    out = tmp_path / "crashed"
    while True:
        resume = out if (out / "options.json").exists() else None
        if resume and method == "hiso" and len(crashed) % 2:
            shutil.rmtree(out / "chosen", ignore_errors=True)
        try:
            assert run(out, method=method, resume=resume) == 0
            break
        except Crash:
            continue
    assert crashed == when
    assert outcome(out) == wanted


def test_a_ledger_has_the_recipe_and_never_the_examples(tmp_path: Path):
    assert run(tmp_path, rounds=4) == 0
    header = hj.Ledger.open(tmp_path / "ledger.sqlite").header
    assert header["about"]["select"] == {
        "method": "vecaf", "budget": 0.3, "renew": 3, "by": "loss", "steps": 3}  # fmt: skip
    assert "picks" not in json.dumps(header)
    options = json.loads((tmp_path / "options.json").read_text())
    options["options"].update(budget=0.5, rounds=5)
    (tmp_path / "options.json").write_text(json.dumps(options))
    # What goes on with another recipe is another run.
    assert run(tmp_path, rounds=5, budget=0.5, resume=tmp_path) == 1


def test_a_recipe_is_refused_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for options, said in (
        (("--select", "vecav"), "--select: expected one of uniform, balanced"),
        (("--select", "vecaf(seed=1)"), "--select: vecaf has no 'seed'"),
        (("--select", "vecaf(steps=0)"), "--select: vecaf: steps: expected an int >= 1"),
        (("--select", "vecaf", "--budget", "0"), "--budget: expected a finite number > 0"),
        (("--select", "loss", "--renew", "0"), "--renew: expected an int >= 1"),
        (("--budget", "0.5"), "--budget: of --select, which is not given"),
        (("--select", "vecaf(eta=0.1)"), "vecaf needs texts of examples, the task gives"),
    ):
        assert said in refuse("digits", *options), options
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="--select: clients look at their examples in one process"):
        jobs.check(digits.Options(select="loss", distributed="auto"))
    bare = PROBLEM._replace(examples=None, name="a task")
    with pytest.raises(ValueError, match="a task tells nothing of its examples; expected uniform"):
        jobs.settle(digits.Options(select="loss"), bare)
    assert jobs.settle(digits.Options(select="uniform"), bare).clients.select is not None


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
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(7, 7)), jnp.float32)
    hidden = lambda params, batch: params[batch["input_ids"]]  # noqa: E731
    loss_fn, _, seen_of = problems.language(hidden, lambda params, x: x)
    ids = rng.integers(0, 7, (4, 6))
    batch = {"input_ids": ids, "attention_mask": np.ones((4, 6), np.int32),
             "target": np.ones((4, 6), np.float32), "weight": np.ones(4, np.float32)}  # fmt: skip
    seen = seen_of(table, batch)
    np.testing.assert_allclose(loss_fn(table, batch), seen["loss"].mean(), rtol=1e-5)
    np.testing.assert_allclose(seen["features"], table[ids].mean(1), rtol=1e-5)
    w = np.array([2, 0, 1, 0.5], np.float32)
    got = loss_fn(table, batch | {"importance": w})
    np.testing.assert_allclose(got, (np.asarray(seen["loss"]) * w).mean(), rtol=1e-5)
    assert adapters.STREAM not in seen


def test_rows_of_selections_are_told_apart():
    from hiso_jax.train import options, results

    base = options.settings(digits.Options())
    assert base["select"] is None
    rows = [options.settings(digits.Options(**own)) | {"metric": 1} for own in (
        {}, {}, {"select": "vecaf", "budget": 0.25}, {"select": "loss", "renew": 50})]  # fmt: skip
    name = results.variant(rows)
    assert [name(row) for row in rows] == ["", "", ", vecaf 25% every 20", ", loss 10% every 50"]
    fresh = {
        k: v for k, v in results.DEFAULTS_OF_OLD_ROWS.items() if k in ("select", "budget", "renew")
    }
    assert len(fresh) == 3 and fresh == {k: base[k] for k in fresh}  # of rows from before


@pytest.mark.parametrize(
    "own", [dict(label="mood", split="iid"), dict(task="lm")], ids=["words", "lm"]
)
def test_examples_of_a_decoder_are_what_its_loss_is_made_of(
    own: dict[str, Any], tiny: Path, tmp_path: Path
):
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in REVIEWS))
    given = finetune.Options(
        model=str(tiny), data=data, text="review", num_clients=3, length=24, **own
    )
    problem = finetune.build(given)
    few = {k: v[:6] for k, v in problem.clients.columns.items()}
    batch = problem.prepare(few | {"weight": np.array([1, 1, 0, 1, 1, 1], np.float32)})
    seen = jax.jit(problem.examples)(problem.params, batch)
    assert seen["features"].shape == (6, 32) and np.isfinite(seen["features"]).all()
    count = batch["target"].sum(1) if "target" in batch else np.ones(6)
    wanted = np.average(seen["loss"], weights=batch["weight"] * count)
    np.testing.assert_allclose(problem.loss_fn(problem.params, batch), wanted, rtol=1e-5)
    chosen = jobs.settle(finetune.Options(select="vecaf(steps=2)", budget=0.5), problem).clients
    chosen.choose(problem.params, chosen.names[:2], 0)
    assert chosen.batches(chosen.names[:2], 0, 4)["input_ids"].shape[:3] == (2, 1, 4)
    if own.get("task") == "lm":
        with pytest.raises(ValueError, match="select: entropy needs entropy of examples"):
            jobs.settle(finetune.Options(select="entropy"), problem)
        with pytest.raises(ValueError, match="--select: balanced goes by classes"):
            jobs.settle(finetune.Options(select="balanced"), problem)
