"""Clients that choose what they learn from: batches, determinism, resumed and crashed runs, costs."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import Chosen, Clients, Select, selecting
from hiso_jax.tasks import problem as problems
from hiso_jax.train import digits, job, report
from hiso_jax.train import selecting as jobs
from tests.helpers import PROBLEMS, assert_same_bits, outcome, refuse, trunk

pytestmark = pytest.mark.usefixtures("no_pictures")

RNG = np.random.default_rng(0)
DATA = {
    f"c{i}": {"x": RNG.normal(size=(9 + 4 * i, 3)).astype(np.float32),
              "y": RNG.normal(size=9 + 4 * i).astype(np.float32),
              "label": np.arange(9 + 4 * i) % 3} for i in range(4)
}  # fmt: skip
LOSS, PARAMS = PROBLEMS["network"]


def examples(params: Any, batch: Any) -> dict[str, jax.Array]:
    kept = trunk(params, batch)
    logits = kept["kept"][:, :3]
    loss = (kept["kept"] @ params["v"] - kept["y"]) ** 2
    return problems.looked_at(kept["kept"], logits, batch, jnp.eye(3, 4)) | {"loss": loss}


def clients(method: str = "vecaf", budget: float = 0.4, renew: int = 3, **own: Any) -> Clients:
    own = {"steps": 3} | own if method in ("active_ft", "vecaf") else own
    return Clients(DATA, Select(method, examples, budget, renew, **own))


def numbers(chosen: Clients, name: str) -> list[int]:
    assert chosen.chosen is not None
    return chosen.chosen.subsets[name].picks.tolist()


@pytest.mark.parametrize("method", selecting.NAMES)
def test_batches_stay_inside_the_subset(method: str):
    own = clients(method)
    own.choose(PARAMS, own.names, 3)
    for round in (3, 4, 5):
        batch = own.batches(own.names, round, batch_size=5, local_steps=2)
        assert ("importance" in batch) == (method == "importance")
        for c, name in enumerate(own.names):
            kept = numbers(own, name)
            assert len(kept) == round_half_up(0.4 * len(DATA[name]["x"]))
            for k in range(2):
                there = batch["weight"][c, k] > 0
                assert there.sum() == min(5, len(kept))
                rows = {tuple(x) for x in batch["x"][c, k][there].tolist()}
                assert rows <= {tuple(x) for x in DATA[name]["x"][kept].tolist()}


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def test_what_is_chosen_by():
    """Scores, classes and texts get to the function that they are for."""
    own, params = clients("loss"), PARAMS
    own.choose(params, ["c2"], 0)
    c2 = DATA["c2"]
    seen = examples(params, c2)
    loss = np.asarray(seen["loss"])
    assert set(numbers(own, "c2")) == set(np.argsort(-loss)[:7])
    own = clients("margin")
    own.choose(params, ["c2"], 0)
    assert set(numbers(own, "c2")) == set(np.argsort(-np.asarray(seen["margin"]))[:7])
    own = clients("balanced", 6 / 17)
    own.choose(params, ["c2"], 0)
    assert np.bincount(c2["label"][numbers(own, "c2")]).tolist() == [2, 2, 2]
    picks = {}
    for eta in (None, 1.0):  # all the way to the texts: three points, one for each class
        own = clients("active_ft", 3 / 17, **({} if eta is None else {"eta": eta}), steps=50)
        assert own.select is not None and own.select.recipe.get("eta") == eta
        own.choose(params, ["c2"], 0)
        picks[eta] = numbers(own, "c2")
    assert picks[None] != picks[1.0]
    by = clients("k_means", by="entropy")
    assert by.select is not None and by.select.recipe == {
        "method": "k_means", "budget": 0.4, "renew": 3, "by": "entropy"}  # fmt: skip


def test_importance_goes_by_scalars_and_its_weights_undo_the_bias():
    """Over many draws the weighted mean of a batch is the mean over the client."""
    own, y = clients("importance", 1.0), DATA["c3"]["y"]
    means = []
    for seed in range(300):
        own.choose(PARAMS, ["c3"], 0, seed)
        batch = own.batches(["c3"], 0, 4, seed=seed)
        means.append((batch["y"] * batch["importance"]).mean())
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - y.mean()) < 4 * error < 0.3
    # Scalars are those of the loss: the same directions, by hand.
    select = own.select
    assert select is not None
    seen = select.look(PARAMS, DATA["c3"], (5,))["scalar"]
    squares = []
    for i in range(selecting.PROBES):
        beside = select._moved(PARAMS, selecting._key((5, i)))
        moves = [np.abs(np.asarray(beside[n] - PARAMS[n])) for n in PARAMS]
        assert all(np.allclose(m, 1e-3, rtol=1e-2) for m in moves)
        away = examples(beside, DATA["c3"])["loss"] - examples(PARAMS, DATA["c3"])["loss"]
        squares.append(np.square(np.asarray(away) / 1e-3))
    np.testing.assert_allclose(seen, np.sqrt(np.mean(squares, 0)), rtol=0.05, atol=5e-3)


def test_losses_of_nothing_weigh_alike():
    """A client whose examples are all learned, to rounding, still chooses."""
    select = clients("vecaf").select
    assert select is not None
    seen = {"features": DATA["c0"]["x"], "loss": np.full(9, -1e-8, np.float32)}
    alike = seen | {"loss": np.ones(9, np.float32)}
    picks = [select.choose(DATA["c0"], x, (0,)).picks for x in (seen, alike)]
    np.testing.assert_array_equal(*picks)


def test_choices_are_functions_of_seed_round_and_model():
    other = {"w": PARAMS["w"] + 1, "v": PARAMS["v"] - 1}

    def chosen(params: Any, round: int = 0, seed: int = 0, first: int = 0) -> dict[str, Any]:
        own = clients()
        own.choose(params, own.names, round, seed, first)
        return {name: numbers(own, name) for name in own.names}

    one = chosen(PARAMS)
    assert one == chosen(PARAMS)
    for another in (chosen(PARAMS, round=3), chosen(PARAMS, seed=1), chosen(other)):
        assert another != one
    # Alone on its machine a client chooses what it would choose in a simulation.
    alone = Clients({"c2": DATA["c2"]}).selecting(clients().select)
    alone.choose(PARAMS, ["c2"], 0, first=2)
    assert numbers(alone, "c2") == one["c2"]


def algorithm() -> hj.Algorithm:
    return hj.decomfl(LOSS, 0.05)


def simulated(own: Clients, state: Any, rounds: int = 8) -> list[federation.Report]:
    take = lambda batch: {k: v for k, v in batch.items() if k in "xy"}  # noqa: E731
    return list(federation.run(algorithm(), state, own, rounds=rounds, clients_per_round=2,
                               batch_size=3, seed=1, prepare=take))  # fmt: skip


def begin() -> Any:
    return algorithm().init(jax.tree.map(jnp.copy, PARAMS), jax.random.key(0))


def test_a_run_chooses_every_third_round_with_the_model_of_that_round(tmp_path: Path):
    own, when = clients(), {}
    choose = own.choose
    own.choose = lambda params, names, round, seed: (  # type: ignore[method-assign]
        when.update({round: (names, jax.tree.map(np.asarray, params))}),
        choose(params, names, round, seed),
    )
    states = {r.round: jax.tree.map(np.asarray, r.state.params) for r in simulated_copies(own)}
    assert list(when) == [0, 3, 6]
    for round, (names, params) in when.items():
        period = range(round, min(round + 3, 8))
        assert set(names) == {n for r in period for n in own.sample(2, r, 1)}
        assert_same_bits(params, states.get(round, PARAMS))
    # The record of every round is what batches of the chosen examples give.
    again = [r.metrics.record for r in simulated(clients(), begin())]
    assert_same_bits(again, [r.metrics.record for r in simulated(clients(), begin())])
    assert any((a != b).any() for a, b in zip(again, [r.metrics.record for r in
               simulated(Clients(DATA), begin())], strict=True))  # fmt: skip


def simulated_copies(own: Clients) -> list[Any]:
    """Reports whose states outlive the next round."""
    take = lambda batch: {k: v for k, v in batch.items() if k in "xy"}  # noqa: E731
    found = []
    for r in federation.run(algorithm(), begin(), own, rounds=8, clients_per_round=2,
                            batch_size=3, seed=1, prepare=take):  # fmt: skip
        found.append(r._replace(state=jax.tree.map(jnp.copy, r.state)))
    return found


def test_a_run_goes_on_with_what_was_chosen_before(tmp_path: Path):
    whole = simulated_copies(clients())
    first = clients()
    half = simulated_copies(first)[4]  # after five rounds; but its clients went on
    with pytest.raises(ValueError, match="batches of round 5 are drawn from what clients chose "
                                         "before round 3, see `choose`; they hold nothing"):  # fmt: skip
        simulated(clients(), jax.tree.map(jnp.copy, half.state))
    chooser = clients()
    chooser.choose(jax.tree.map(jnp.copy, whole[2].state.params), ["c0", "c1", "c2", "c3"], 3, 1)
    assert chooser.chosen is not None
    chooser.chosen.save(tmp_path / "chosen.npz")
    later = clients()
    later.chosen = Chosen.load(tmp_path / "chosen.npz", later)
    rest = simulated(later, jax.tree.map(jnp.copy, half.state))
    for a, b in zip(rest, whole[5:], strict=True):
        assert_same_bits(a.metrics.record, b.metrics.record)


def test_what_was_chosen_is_kept_whole_or_not_used(tmp_path: Path):
    path = tmp_path / "chosen.npz"
    for method in ("k_center", "importance"):
        own = clients(method)
        own.choose(PARAMS, ["c3", "c1"], 6)
        assert own.chosen is not None
        own.chosen.save(path)
        found = Chosen.load(path, own)
        assert found is not None and found.round == 6 and list(found.subsets) == ["c3", "c1"]
        for name, subset in found.subsets.items():
            assert_same_bits(list(subset), list(own.chosen.subsets[name]))
    assert Chosen.load(tmp_path / "none.npz", own) is None
    assert (
        Chosen.load(path, Clients({"c3": DATA["c0"], "c1": DATA["c0"]})) is None
    )  # fewer examples
    assert Chosen.load(path, Clients({"c3": DATA["c3"]})) is None
    whole = path.read_bytes()
    for place in range(len(whole)):  # some of whose changes zipfile calls a RuntimeError
        bit = 1 << place % 8
        for changed in {bit, 1, 8}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ changed]) + whole[place + 1 :])
            found = Chosen.load(path, own)
            assert found is None or (found.round == 6 and list(found.subsets) == ["c3", "c1"])
    path.write_bytes(whole[:-40])
    assert Chosen.load(path, own) is None


def test_looks_are_counted():
    """What is said to be looked at is what the model is asked for."""
    for method, each in (("uniform", 0), ("balanced", 0), ("loss", 1), ("vecaf", 1),
                         ("importance", 1 + selecting.PROBES)):  # fmt: skip
        own, seen = clients(method), []
        assert own.select is not None
        sweep = own.select._sweep
        own.select._sweep = lambda params, columns, wanted, sweep=sweep, seen=seen: (  # type: ignore
            seen.append(len(columns["x"])), sweep(params, columns, wanted))[1]  # fmt: skip
        simulated(own, begin(), rounds=5)
        assert sum(seen) == own.look_passes(5, 2, seed=1)
        assert (sum(seen) > 0) == bool(each)


@pytest.mark.parametrize("method, own, said", [
    ("nothing", {}, "select: expected one of uniform, balanced, .*, got 'nothing'"),
    ("vecaf", dict(budget=0.0), "budget: expected a finite number > 0"),
    ("vecaf", dict(budget=1.1), "budget: expected a finite number > 0 and <= 1"),
    ("vecaf", dict(renew=0), "renew: expected an int >= 1, got 0"),
    ("uniform", dict(steps=3), "select: uniform has no 'steps'; it takes none"),
    ("vecaf", dict(by="margin"), "select: by: expected one of"),
    ("vecaf", dict(ensemble=0), "select: vecaf: ensemble: expected an int >= 1"),
    ("active_ft", dict(steps=0), "select: active_ft: steps: expected an int >= 1"),
    ("importance", dict(share=2.0), "select: importance: share: expected a finite number"),
])  # fmt: skip
def test_bad_recipes_are_refused(method: str, own: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Select(method, examples, **own)


def test_what_cannot_be_chosen_by_is_refused():
    plain = lambda params, batch: {"loss": batch["y"]}  # noqa: E731
    select = Select("k_means", plain)
    with pytest.raises(ValueError, match="k_means needs features of examples, the task gives loss"):
        select.check(PARAMS, DATA["c0"])
    with pytest.raises(ValueError, match="examples: expected a function for vecaf, got None"):
        Select("vecaf", None)
    own = clients("loss")
    with pytest.raises(ValueError, match="round: expected one in which clients choose anew, got 2"):
        own.choose(PARAMS, own.names, 2)
    with pytest.raises(FloatingPointError, match="select: NaN or infinite loss of examples"):
        own.choose({**PARAMS, "v": PARAMS["v"] * np.nan}, own.names, 0)
    taken = Clients({n: c | {"importance": c["y"]} for n, c in DATA.items()})
    with pytest.raises(ValueError, match="data: expected no column called 'importance'"):
        taken.selecting(clients("importance").select).choose(PARAMS, ["c0"], 0)
    own.choose(PARAMS, ["c1"], 0)
    with pytest.raises(ValueError, match="'c0' has chosen nothing in round 0"):
        own.batches(["c0"], 1, 2)


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


@pytest.mark.slow
@pytest.mark.ci
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


def test_rows_of_selections_are_told_apart():
    from hiso_jax.train import curves, options

    base = options.settings(digits.Options())
    assert base["select"] is None
    rows = [options.settings(digits.Options(**own)) | {"metric": 1} for own in (
        {}, {}, {"select": "vecaf", "budget": 0.25}, {"select": "loss", "renew": 50})]  # fmt: skip
    name = curves.variant(rows)
    assert [name(row) for row in rows] == ["", "", ", vecaf 25% every 20", ", loss 10% every 50"]
    fresh = {
        k: v for k, v in curves.DEFAULTS_OF_OLD_ROWS.items() if k in ("select", "budget", "renew")
    }
    assert len(fresh) == 3 and fresh == {k: base[k] for k in fresh}  # of rows from before
