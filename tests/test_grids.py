"""Searches for learning rates, and the files that say what is searched; nothing is trained."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiso_jax.train import compare, grids, methods, results, rows, search
from hiso_jax.train.search import Search
from tests.helpers import ROOT, refuse

COMMITTED = sorted((ROOT / "experiments/grids").glob("*.toml"))


def run(wanted: Search, end: Any, found: dict[search.Run, float] | None = None) -> Any:
    """Do what a search asks for; return what there is, and what was asked for step by step."""
    found, steps = dict(found or {}), []
    while runs := search.missing(wanted, found):
        steps.append(runs)
        found |= {own: end(*own) for own in runs}
        assert len(steps) < 50
    return found, steps


searches = st.builds(
    lambda low, factor, count, **how: Search(
        tuple(float(f"{low * factor**i:.6g}") for i in range(count)), **how
    ),
    st.floats(1e-5, 1.0), st.sampled_from([2, 3, 4, 10]), st.integers(2, 6), seeds=st.integers(1, 3),
    extend=st.booleans(), refine=st.booleans(), seeds_at_best=st.integers(0, 4),
)  # fmt: skip
ends = st.tuples(st.floats(-14, 2), st.floats(0, 0.01), st.floats(-5, 5))


def valley(best: float, noise: float, cliff: float) -> Any:
    """Losses with one lowest place; from some rate on, runs diverge."""

    def end(rate: float, seed: int) -> float:
        at = math.log(rate)
        return math.inf if at > best + 5 + cliff else (at - best) ** 2 + noise * (seed % 2)

    return end


@given(searches, ends)
def test_a_search_ends_where_it_should(wanted: Search, shape: tuple[float, float, float]):
    found, steps = run(wanted, valley(*shape))
    rates = sorted({rate for rate, _ in found})
    first = {(rate, seed) for rate in wanted.rates for seed in range(wanted.seeds)}
    assert set(steps[0]) == first and sum(map(len, steps)) == len(found)
    tried = [rate for rate in rates if (rate, wanted.seeds - 1) in found]
    mean = lambda rate: sum(found[rate, seed] for seed in range(wanted.seeds))  # noqa: E731
    best = min(tried, key=mean)
    for rate in rates:
        seeds = max(wanted.seeds, wanted.seeds_at_best if rate == best else 0)
        assert [s for r, s in found if r == rate] == list(range(seeds))
    if not wanted.extend and not wanted.refine:
        assert set(rates) == set(wanted.rates)
    if wanted.extend and len(tried) < len(wanted.rates) + search.FARTHEST:
        assert rates[0] < best < rates[-1]
    if wanted.refine:  # within the root of the factor, there is one beside the best
        factor = wanted.rates[1] / wanted.rates[0]
        assert any(1 < max(r / best, best / r) <= 1.001 * factor**0.5 for r in rates)


@given(searches, ends, st.data())
def test_a_search_that_was_cut_off_goes_on_to_the_same_end(
    wanted: Search, shape: tuple[float, float, float], data: st.DataObject
):
    end = valley(*shape)
    found, _ = run(wanted, end)
    lost = data.draw(st.sets(st.sampled_from(sorted(found))))
    # Rates and seeds that nobody asked for change nothing.
    others = {(1.2345, 0): -1e9, (wanted.rates[0], 77): -1e9}
    again, _ = run(wanted, end, {k: v for k, v in found.items() if k not in lost} | others)
    assert again == found | others
    assert search.asked(wanted, again) and set(search.asked(wanted, again)) == found.keys()
    assert search.forecast(wanted, again) == 0


def test_the_protocol_of_the_documents():
    """A look at factors of four, then a factor of two beside the best, then two more seeds."""
    wanted = Search((0.004, 0.016, 0.064), extend=True, refine=True, seeds_at_best=3)
    _, steps = run(wanted, lambda rate, seed: abs(math.log(rate / 0.12)))
    assert steps == [
        [(0.004, 0), (0.016, 0), (0.064, 0)],
        [(0.256, 0)],
        [(0.032, 0), (0.128, 0)],
        [(0.128, 1), (0.128, 2)],
    ]
    assert search.forecast(wanted, {}) == 3 + 2 + 2
    diverging, _ = run(wanted, lambda *_: math.inf)
    lowest = 0.004 / 4**search.FARTHEST / 2  # downwards, but not for ever
    assert min(diverging)[0] == pytest.approx(lowest, 1e-4)


def row(name: dict[str, Any], loss: float | None, figure: float, **more: Any) -> dict[str, Any]:
    own = dict(metric="accuracy", curve=[[0, 2.3, 0.1], [6, loss, figure]], diverged=False)
    return json.loads(json.dumps(name | own | more))


def test_the_best_is_by_loss_or_by_metric_and_never_diverged():
    name: dict[str, Any] = {}
    assert grids.score(row(name, 0.5, 0.9)) == 0.5
    assert grids.score(row(name, 0.5, 0.9), "metric") == -0.9
    assert grids.score(row(name, 0.5, 1.6, metric="perplexity"), "metric") == 1.6
    for bad in (row(name, 0.5, 0.9, diverged=True), row(name, None, 0.9)):
        assert grids.score(bad) == math.inf


FILE = """
task = "digits"
seeds = 1
vary = { rounds = 6, alpha = [1, inf] }
[[run]]
methods = ["decomfl", "hiso( update_steps='all' )"]
learning_rate = [0.01, 0.04]
extend = true
seeds_at_best = 2
[[run]]
method = "rms"
learning_rate = 1
vary = { alpha = 0.5, own_directions = true }
seeds = 2
"""


def test_a_grid_is_run_from_its_rows(tmp_path: Path):
    """The loop of `compare.run` with a file between any two steps, and without the training."""
    path, out = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    path.write_text(FILE)
    assert grids.read(path).out == Path("runs/own.jsonl")
    grid, steps = grids.read(path, out=out), []
    while True:
        found = grids.Found(grid, results.read(out))
        wanted = [name for entry in grid.entries for name, _ in grids.missing(entry, found)]
        if not wanted:
            break
        steps.append(len(wanted))
        with rows.append(out) as add:
            for name in wanted:
                loss = abs(math.log(name["learning_rate"] / 0.05))
                add(row(name, loss, 0.5))
    # Four searches of two rates, and two runs; 0.16 for each; a second seed at 0.04.
    assert steps == [4 * 2 + 2, 4, 4]
    done = grids.finished(grid, found)
    assert len(done) == sum(steps) and all(grids.forecast(e, found) == 0 for e in grid.entries)
    assert {r["method"] for r in done} == {"decomfl", "hiso(update_steps=all)", "rms"}
    assert {r["alpha"] for r in done} == {1.0, "inf", 0.5}
    assert [r["per_client_directions"] for r in done if r["method"] == "rms"] == [True, True]
    assert {r["rounds"] for r in done} == {6}
    # Rows of other options, and of an older version that lacked one, are none of these runs.
    others = [r | {"rounds": 7} for r in done] + [
        {k: v for k, v in done[0].items() if k != "decay"}
    ]
    assert grids.finished(grid, grids.Found(grid, others)) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_rows_are_those_of_the_committed_grids(path: Path):
    """Nothing is missing, and there is no row that its grid does not ask for."""
    grid = grids.read(path)
    known = results.read(ROOT / grid.out)
    found = grids.Found(grid, known)
    for entry in grid.entries:
        assert [name for name, _ in grids.missing(entry, found)] == [], entry.name
    assert len(grids.finished(grid, found)) == len(known) > 0


def test_there_is_a_grid_for_every_file_of_rows():
    files = {p.stem for p in (ROOT / "docs/results").glob("*.jsonl")}
    # Rows of experiments.private and experiments.spectrum, which have options instead of a grid.
    others = {"private", "spectrum", "spectrum_examples"}
    assert files == {path.stem for path in COMMITTED} | others


@pytest.mark.parametrize("old, new, said", [
    ("[[run]]", "[[runs]]", "expected entries, each under"),
    ("seeds = 1\n", "seeds = 1 2\n", r"own.toml: .*line 3"),
    ("seeds = 1\n", "seedz = 1\n", "own.toml: seedz: expected one of task, data"),
    ("seeds = 1\n", "seeds = 0\n", "entry 1: seeds: expected an int >= 1"),
    ('task = "digits"', "", "own.toml: task: expected one of finetune"),
    ('task = "digits"', 'task = "digit"', "own.toml: task: expected one of finetune.*'digit'"),
    ('task = "digits"', 'task = "digits"\ndata = "x"', "own.toml: data: digits reads none"),
    ("seeds = 2", 'seeds = "2"', "entry 2: seeds: expected a whole number, got '2'"),
    ("seeds = 2", "seeds = true", "entry 2: seeds: expected a whole number, got True"),
    ("seeds = 2", "rate = 2", "entry 2: rate: expected one of method, learning_rate"),
    ("seeds = 2", 'out = "x"', "entry 2: out: stands at the top"),
    ("seeds = 2", 'by = "luck"', "entry 2: by: expected one of loss, metric, got 'luck'"),
    ("seeds = 2", "extend = true", "entry 2: extend: expected two learning rates"),
    ("rate = 1\n", "rate = 0\n", r"entry 2: learning_rate: expected a finite number > 0"),
    ("rate = 1\n", "rate = []\n", "entry 2: learning_rate: expected at least one"),
    ("rate = 1\n", 'rate = ["1"]\n', r"entry 2: learning_rate: expected a number, got \['1'\]"),
    ('"rms"', '"rm"', "entry 2: method: expected one of hiso, .*got 'rm'"),
    ('"rms"', '"rms"\nmethods = ["hiso"]', "entry 2: methods: .*got both"),
    ('"rms"', '"rms(b1=0.9)"', "entry 2: method: expected an argument out of decay, .* for rms"),
    ("alpha = 0.5", "alphas = 0.5", "entry 2: vary: digits has no option 'alphas'"),
    ("alpha = 0.5", "seed = 3", "entry 2: vary: digits has no option 'seed'"),
    ("alpha = 0.5", "alpha = []", "entry 2: vary: expected at least one value for alpha"),
    ("alpha = 0.5", 'alpha = "x"', "entry 2: vary: expected a number for alpha"),
    ("alpha = 0.5", "eval_every = 0", "entry 2: eval_every: expected an int >= 1"),
    ("alpha = 0.5", 'estimator = "x"', "entry 2: vary: expected one of forward, central"),
])  # fmt: skip
def test_bad_files_are_refused_at_the_door(tmp_path: Path, old: str, new: str, said: str):
    assert FILE.count(old) >= 1
    path = tmp_path / "own.toml"
    text = FILE.replace(old, new) if old == "[[run]]" else FILE.replace(old, new, 1)
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        grids.read(path)


def test_the_command_line(tmp_path: Path):
    path, out = tmp_path / "own.toml", tmp_path / "rows.jsonl"
    path.write_text(FILE)
    said = refuse("compare", "--grid", str(tmp_path / "won.toml"))
    assert said.startswith("--grid: ") and "won.toml is not there" in said and "exit 1" in said
    said = refuse("compare", "--grid", str(path), "--seeds", "2")
    assert said.startswith("--seeds: ") and said.endswith("exit 1")
    assert "no other option beside --grid" in said
    options = compare.Compare(grid=path, out=out, data=Path("x"))
    with pytest.raises(SystemExit, match="data: digits reads none"):
        compare.run(options)
    options = dataclasses.replace(options, data=None, dry_run=True)
    assert compare.run(options) == [] and not out.exists()
    one = compare.plan(compare.Compare(extend=True, seeds=1, by="metric", vary=("rounds=5",)))
    assert one.out == Path("runs/compare.jsonl") and len(one.entries) == 1
    assert one.entries[0].search == Search((5e-3, 1e-2, 2e-2, 4e-2, 8e-2), 1, True, False, 1)
    assert one.entries[0].by == "metric" and one.entries[0].points[0].rounds == 5


def test_a_dry_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "own.toml"
    path.write_text(FILE)
    compare.run(compare.Compare(grid=path, out=tmp_path / "rows.jsonl", dry_run=True))
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "entry 1, decomfl hiso( update_steps='all' ): 8 missing, then at least "
    )
    assert second == "entry 2, rms, alpha=0.5, own_directions=True: 2 missing"
    assert "to run in all" in last


def test_methods_take_arguments():
    for text, same in (
        ("hiso", "hiso"),
        ("hiso()", "hiso"),
        ("hiso(update_steps='all')", "hiso(update_steps=all)"),
        ("adam( b2=0.99, b1 = 5e-1 )", "adam(b1=0.5,b2=0.99)"),
        ("fedadam(client_learning_rate=0.1)", "fedadam(client_learning_rate=0.1)"),
        ("hiso_jax:decomfl(seed_pool=64)", "hiso_jax:decomfl(seed_pool=64)"),
    ):
        assert methods.check(text) == same == methods.spelled(*methods.parse(same))
    for text, said in (
        ("hiso(update_steps=some)", r"expected one of \('last', 'all'\), got 'some'"),
        ("hiso(steps=all)", "out of epsilon, nonfinite, seed_pool, update_steps for hiso, got 'st"),
        ("hiso(decay=0.9)", "is an option: --decay"),
        ("decomfl(num_perturbations=3)", "is an option: --num-perturbations"),
        ("fedavg(client_learning_rate=1)", "expected no argument for fedavg"),
        ("hiso(epsilon=1,epsilon=2)", "twice"),
        *((t, r"expected name or name\(argument=value\)") for t in ("hiso(", "hiso(all)", "hiso(a=1)b",
                                                                  "hiso(a=b-c)", "hiso(a=1)(b=2)")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"--method: .*{said}"):
            methods.check(text)
    assert methods.title("rms(decay=0.9), per-client directions") == (
        "DeComFL / rms (decay=0.9), per-client directions"
    )


@pytest.mark.parametrize("method", [*methods.NAMES, "hiso(update_steps=all)", "rms(decay=0.5)"])
def test_every_method_is_built_with_the_options_of_a_job(method: str):
    """Also those that have an estimator of their own."""
    from hiso_jax.tasks.problem import Problem

    problem: Any = Problem.__new__(Problem, *[None] * len(Problem._fields))
    problem = problem._replace(loss_fn=lambda params, batch: 0.0, lazy=False)
    options = compare.plan(compare.Compare(method=(method,))).entries[0].points[0]
    alg: Any = methods.build(options, problem, 0.1)
    own = alg.spec.rule.config if hasattr(alg, "spec") else {}
    assert method != "hiso(update_steps=all)" or own["update_steps"] == "all"
    assert method != "rms(decay=0.5)" or own["decay"] == 0.5


def test_rows_of_old_names_and_conditions(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    old = {"method": "experiments.methods:hiso_all", "own_directions": True, "alpha": math.inf}
    path.write_text(json.dumps(old) + "\n")
    (read,) = results.read(path)
    assert read["method"] == "hiso(update_steps=all)" and read["alpha"] == "inf"
    same = [read, read | {"method": "adam(b1=0.5,b2=0.9)"}, read | {"method": "rms"}]
    assert results.where(same, ("method=hiso(update_steps=all),adam(b1=0.5,b2=0.9)",)) == same[:2]
    assert results.where(same, ("own_directions=True", "alpha=inf")) == same


def test_rows_are_added_and_counted(tmp_path: Path):
    path = tmp_path / "a/rows.jsonl"
    with rows.append(path):
        pass
    assert not path.exists()  # a file without a row is not left behind
    with rows.append(path) as add:
        add({"seed": 0, "x": float("nan")})
        assert rows.read(path) == [{"seed": 0, "x": None}]  # at once
    path.write_text(path.read_text() + '{"seed": 1, "x"')
    with rows.append(path) as add:
        add({"seed": 2, "x": 1})
    found = rows.read(path)
    assert [r["seed"] for r in found] == [0, 2]
    wanted = [{"seed": seed} for seed in range(3)]
    assert rows.missing(wanted, found) == [{"seed": 1}] and rows.of(wanted[1:], found) == found[1:]
    assert rows.missing([], found) == rows.of([], found) == []
