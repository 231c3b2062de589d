"""Comparisons: resumable, fair, and drawn from rows that anyone can read."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

import hiso_jax as hj
from experiments import blocks, mnist, robustness
from experiments.curvature import gain
from hiso_jax import federation
from hiso_jax._engine import trees
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import compare, curves, digits, finetune, grids, report, results
from tests.helpers import finish, start

GRID = ("--task", "digits", "--method", "decomfl", "fedavg", "--learning-rate", "0.04",
        "--seeds", "1", "--vary", "rounds=6", "eval_every=3", "--processes", "2")  # fmt: skip


@pytest.mark.slow
@pytest.mark.ci
def test_a_grid_is_run_once_and_grown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """By the command and its two workers; then by this process and a worker, from where it was cut.

    Workers are always processes of their own. All of them, here, have the settings of the tests.
    """
    path = tmp_path / "rows.jsonl"
    first = finish(start("compare", *GRID, "--out", str(path), environment=dict(os.environ)))
    assert "DeComFL" in first and "FedAvg" in first
    rows = curves.read(path)
    page = path.with_suffix(".html").read_text()
    assert str(path.with_suffix(".html")) in first and page.count('type="checkbox"') == 2
    assert sorted((r["method"], r["learning_rate"]) for r in rows) == [
        ("decomfl", 0.04), ("fedavg", 0.04)]  # fmt: skip
    assert all([point[0] for point in r["curve"]] == [0, 3, 6] for r in rows)
    passes = {r["method"]: (r["passes_per_round"], r["bytes_per_round"]) for r in rows}
    assert passes == {"decomfl": (11, 40), "fedavg": (3, 4 * 4610)}
    # The last line was being written when the machine went down.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:40])
    options = compare.Compare(task="digits", method=("decomfl", "fedavg"), learning_rate=(0.04,),
                              seeds=1, vary=("rounds=6", "eval_every=3"), out=path)  # fmt: skip
    assert len(compare.run(options)) == 2
    again = path.read_text().splitlines(keepends=True)
    assert again[0] == lines[0] and len(curves.read(path)) == 2
    cut, redone = json.loads(lines[1]), json.loads(again[-1])
    assert redone["method"] == cut["method"]
    assert redone["curve"] == cut["curve"]  # the same run, in another process
    picture = tmp_path / "all.png"
    again_page = tmp_path / "again.html"
    given = results.Results(rows=(path,), picture=picture, where=("rounds=6",), page=again_page)
    results.main(given)
    assert "| DeComFL | " in capsys.readouterr().out and picture.stat().st_size > 10_000
    assert again_page.read_text().count('type="checkbox"') == 2
    # Rows of another model, which would be compared with those of this one.
    other = [r | {"curve": [[0, 1.01 * r["curve"][0][1], 0.1], *r["curve"][1:]]} for r in
             map(json.loads, lines)]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in other))
    more = dataclasses.replace(options, method=("decomfl",), learning_rate=(0.08,))
    with pytest.raises(SystemExit, match="another model, or other data"):
        compare.run(more)
    assert len(curves.read(path)) == 2


def row(method: str, rate: float, seed: int, figures: list[float], diverged: bool = False) -> dict:
    curve = [[10 * i, 1 - f, f] for i, f in enumerate(figures)]
    return dict(method=method, learning_rate=rate, seed=seed, metric="accuracy", curve=curve,
                test=figures[-1], test_loss=0.0, diverged=diverged, passes_per_round=6,
                bytes_per_round=20, seconds=1.0)  # fmt: skip


def test_the_table_says_what_the_rows_say(tmp_path: Path):
    rows = [
        row("decomfl", 1.0, 0, [0.1, 0.5, 0.7, 0.8]),
        row("decomfl", 1.0, 1, [0.1, 0.5, 0.7, 0.9]),
        row("decomfl", 2.0, 0, [0.1, 0.2, 0.2, 0.2]),
        row("decomfl", 2.0, 1, [0.1, 0.3], diverged=True),
        row("hiso", 1.0, 0, [0.1, 0.3, 0.5, 0.6]),
        row("hiso", 2.0, 0, [0.1, 0.9, 0.8, 0.88]),
        row("hiso", 4.0, 0, [0.1, 0.2, 0.3, 0.4]),
    ]
    header, lines = results.summary(rows)
    assert header[6:8] == ["rounds to 80.8%", "to 85.0%"]
    assert lines[0][:2] == ["HiSo", "2"] and lines[0][5:] == ["0", "10", "10", "60", "50"]
    assert lines[1][1] == "1 (edge)" and lines[1][3] == "85.0% ± 7.1%"
    assert lines[1][5:] == ["1", "30", "30", "180", "150"]
    worse = [r for r in rows if r["method"] == "decomfl" or r["learning_rate"] == 4.0]
    assert results.summary(worse)[1][-1][6:] == ["never", "never", "", ""]
    diverged = next(c for c in curves.curves(rows) if c.method == "decomfl" and c.diverged)
    assert np.isinf(diverged.loss)
    # The other way round: HiSo's own best of 90 %, and what it and others pay for that.
    header, lines = results.summary(rows, baseline="hiso")
    assert header[6:8] == ["rounds to 85.5%", "to 90.0%"]
    assert lines[0][6:] == ["10", "10", "60", "50"]
    assert lines[1][6:] == ["never", "never", "", ""]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(
        SystemExit, match="--baseline: expected one of 'decomfl', 'hiso', got 'rms'"
    ):
        results.main(results.Results(rows=(path,), baseline="rms"))


@pytest.mark.parametrize("methods", [("decomfl", "rms"), tuple("abcdefghijkl")])
def test_a_narrow_terminal_cuts_nothing_off(methods: tuple[str, ...], monkeypatch: Any):
    narrow = Console(width=80, file=io.StringIO())
    monkeypatch.setattr(report, "console", narrow)
    header, lines = results.summary(
        [row(name, 1.0, s, [0.1, 0.5]) for name in methods for s in (0, 1)]
    )
    narrow.print(results.ruled(header, lines))
    shown = narrow.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\u2026" not in shown and max(map(len, shown.splitlines())) <= 80
    if len(methods) == 2:
        assert "learning rate" in shown and "50.0% ± 0.0%" in shown  # each on one line


def test_own_directions_are_a_curve_of_their_own():
    rows = [
        row("decomfl", 1.0, 0, [0.1, 0.5]) | {"per_client_directions": own} for own in (False, True)
    ]
    assert [c.method for c in curves.curves(rows)] == ["decomfl", "decomfl, per-client directions"]
    assert results.summary(rows)[1][1][0] == "DeComFL, per-client directions"


def test_what_most_rows_have_is_that_of_plain_rows():
    """More rows with ten upper directions than with five of everything: the latter are plain."""
    rows = [row("decomfl", 1.0, seed, [0.1, 0.5]) for seed in range(3)]
    rows = [{"num_perturbations": 10, "upper_directions": 10, "upper_layers": 1} | r for r in rows]
    rows.append({"num_perturbations": 5} | row("decomfl", 1.0, 0, [0.1, 0.4]))
    names = {c.method for c in curves.curves(rows)}
    assert names == {"decomfl, 10 of 10 in the last layer", "decomfl"}


def test_runs_of_other_options_are_not_mixed():
    """What differs from most rows is named; the table across has a line for it."""
    rows = [{"decay": 0.95} | row("hiso", 1.0, seed, [0.1, 0.5]) for seed in range(3)]
    rows += [{"decay": 0.9} | row("hiso", 1.0, 0, [0.1, 0.7])]
    rows += [{"decay": 0.95} | row("decomfl", 2.0, 0, [0.1, 0.25])]
    assert [c.method for c in curves.curves(rows)] == ["hiso", "hiso, decay=0.9", "decomfl"]
    header, lines = results.pivot(rows)
    assert header == ["", "HiSo", "DeComFL"]
    assert lines == [
        ["as most", "0.500, 50.0 ± 0.0 at 1", "0.750, 25.0 at 2"],
        ["decay=0.9", "0.300, 70.0 at 1", ""],
    ]
    assert results.where(rows, ("decay=0.9,0.95", "method=decomfl")) == rows[4:]
    rows.append({"decay": 0.95} | row("rms", 4.0, 0, [0.1, 0.125]))
    header, lines = results.pivot(rows)  # three methods, two lines: the other way round
    assert header == ["", "as most", "decay=0.9"]
    assert lines[0] == ["HiSo", "0.500, 50.0 ± 0.0 at 1", "0.300, 70.0 at 1"]
    assert [line[0] for line in lines] == ["HiSo", "DeComFL", "DeComFL / rms"]


def test_blocks_of_a_quadratic():
    """Traces, gradients and gains that are known: 0.5 sum_b c_b |x_b - y|^2."""
    curvature = {"body/layers/w": jnp.array([1.0, 4.0])[:, None], "head": jnp.array(9.0)}
    params = {"body": {"layers": {"w": jnp.full((2, 50), 0.5)}}, "head": jnp.full(10, 2.0)}

    def loss_fn(params: Any, batch: Any) -> Any:
        shift = (batch["y"] * batch["weight"]).sum() / batch["weight"].sum()
        leaves = trees.select(params)
        return sum(0.5 * (c * (leaves[n] - shift) ** 2).sum() for n, c in curvature.items())

    clients = {f"client {i}": {"y": np.zeros(128, np.float32)} for i in range(8)}
    held = {"y": np.zeros(1, np.float32)}
    own = Problem("quadratic", params, loss_fn, lambda *_: {}, federation.Clients(clients), held,
                  held, lambda *_: None)  # fmt: skip
    alg = hj.federated_hiso(loss_fn, 0.1)
    look = blocks.Look(own, finetune.Options(clients_per_round=4), 1024, 4)
    figures, found = look(alg.init(params, jax.random.key(0)))
    assert blocks.block_names(look.pick(params)) == ["body/layers/w[0]", "body/layers/w[1]", "head"]
    signal = np.array([0.25 * 50, 16 * 0.25 * 50, 81 * 4.0 * 10])
    trace = np.array([50.0, 200, 90])
    np.testing.assert_allclose(found["signal"], signal, rtol=1e-5)
    np.testing.assert_allclose(found["trace"], trace, rtol=1e-5)
    np.testing.assert_allclose(found["alone"], signal, rtol=1e-5)
    assert figures["zeta"] == figures["trace"] == pytest.approx(340)
    assert figures["largest"] == pytest.approx(9, rel=1e-4)
    assert figures["gain_own"] == pytest.approx(4)  # no noise: C times as many directions
    leaves = trees.named(params | {"tail": jnp.ones(1)})
    parts = blocks.parts_of(leaves, {"head": 0})
    assert parts == ["layer 0", "layer 1", blocks.ABOVE, blocks.BELOW]
    sums = {
        k: np.append(x, 10.0) for k, x in (("signal", signal), ("noise", signal), ("trace", trace))
    }
    _, lines = blocks.by_layer(parts, sums, lambda count: count / 10)
    assert [line[-1] for line in lines] == ["1", "", "0.10", ""] and lines[0][5] == "1.00"
    assert lines[-1][4] == lines[-1][5] == f"{3240 / 90 / (signal.sum() + 10) * 350:.2f}"
    assert lines[1][3] == f"{50 / 350:.1%}"
    scales = signal / trace
    best = (scales @ signal) / (scales @ trace) / (signal.sum() / trace.sum())
    assert figures["gain_blocks"] == pytest.approx(best, rel=1e-4)
    per_element = np.repeat(scales, 2)  # the same by element, as `experiments.curvature` has it
    g, c = np.sqrt(np.repeat(signal, 2) / 2), np.repeat(trace, 2) / 2
    assert gain(per_element, g**2, g**2, c) == pytest.approx(best, rel=1e-4)


def test_bad_options_are_named():
    for text, said in (
        ("rounds", "name=value"),
        ("round=3", "an option"),
        ("rounds=x", "values of"),
        ("per_client_directions=2", "values of .*true or false"),
        ("distribution=even", "values of .*rademacher"),
    ):
        with pytest.raises(SystemExit, match=f"--vary: .*{said}"):
            compare.varied(digits.Options, (text,))
    assert compare.varied(mnist.Options, ("alpha=0.1,inf",))["alpha"] == (0.1, float("inf"))
    assert compare.varied(digits.Options, ("own-directions=true",)) == {
        "per_client_directions": (True,)
    }
    lists = ("lora_targets=q_proj,k_proj",)  # of one, each
    assert compare.varied(finetune.Options, lists) == {"lora_targets": (("q_proj",), ("k_proj",))}
    optional = ("length=48", "model=folder")  # None by default
    assert compare.varied(finetune.Options, optional) == {"length": (48,), "model": ("folder",)}
    with pytest.raises(SystemExit, match="--method: expected one of"):
        compare.run(compare.Compare(method=("nothing",), out=Path("/tmp/never.jsonl")))


@pytest.mark.slow
@pytest.mark.ci
def test_attackers_lie_and_the_median_bears_it(tmp_path: Path):
    scalars = np.random.default_rng(0).normal(size=(10, 1, 3)).astype(np.float32)
    key = robustness.jax.random.key(0)
    for kind in ("gaussian", "sign", "scaled", "colluding"):
        sent = np.asarray(robustness.attack(kind, 0.3)(scalars, key))
        np.testing.assert_array_equal(sent[3:], scalars[3:])
        assert (sent[:3] != scalars[:3]).all()
    out = tmp_path / "rows.jsonl"
    options = robustness.Robustness(rounds=40, seeds=1, shares=(0.4,), out=out)
    point = dict(what="attacks", attack="scaled", share=0.4, aggregator="median")
    assert robustness._one(options, point, 0) > 0.12
    private = dict(what="privacy", noise=5.0, clip=2.0)
    few = dataclasses.replace(options, rounds=5)  # it runs; how well is not asked here
    rows = [private | {"seed": 0, "accuracy": robustness._one(few, private, 0)}]
    table = robustness.table(robustness.Robustness(what="privacy", rounds=40), rows)
    assert table[1][0] == "5" and float(table[1][1]) > 1


@pytest.mark.parametrize("task", compare.TASKS)
def test_every_task_has_a_grid_of_rows_that_differ(task: str):
    options = compare.Compare(task=task, seeds=2, vary=("upper_directions=0,3",))  # type: ignore
    grid = compare.plan(options)
    every = grids.missing(grid.entries[0], grids.Found(grid, []))
    rows = [json.dumps(name) for name, _ in every]
    assert len(set(rows)) == len(rows) == 2 * 5 * 2 * 2
    assert all(json.loads(row)["task"] == task for row in rows)


def test_upper_directions_are_a_curve_of_their_own():
    plain = row("decomfl", 1.0, 0, [0.1, 0.5]) | {"num_perturbations": 5}
    upper = plain | {"num_perturbations": 10, "upper_directions": 8, "upper_layers": 2}
    named = curves.variant([curves.DEFAULTS_OF_OLD_ROWS | r for r in (plain, plain, upper)])
    assert named(curves.DEFAULTS_OF_OLD_ROWS | plain) == ""
    assert named(upper) == ", 8 of 10 in the last 2 layers"


def test_rates_with_more_seeds_are_compared():
    rows = [row("decomfl", 1.0, seed, [0.1, 0.5]) for seed in range(2)]
    lucky = [row("decomfl", 2.0, 0, [0.1, 0.9]), row("decomfl", 0.5, 0, [0.1, 0.2])]
    rows += [row("hiso", 1.0, seed, [0.1, 0.6]) for seed in range(2)]
    header, (first, second) = results.summary(rows + lucky, "loss")
    assert header[6:8] == ["rounds to 0.526", "to 0.500"]
    assert first[:3] == ["HiSo", "1", "0.400"] and second[:3] == ["DeComFL", "1", "0.500"]
    assert first[6:] == second[6:] == ["10", "10", "60", "50"]


def test_a_perplexity_is_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [row("decomfl", 1.0, seed, [0.1, 0.5]) | {"metric": "perplexity"} for seed in range(2)]
    for one in rows:
        one["curve"] = [[at, loss, float(np.exp(loss))] for at, loss, _ in one["curve"]]
    assert results.summary(rows)[1][0][3] == "1.65 ± 0.00"
    assert results.pivot(rows)[1] == [["as most", "0.500, 1.6 ± 0.0 at 1"]]
    assert results.summary(rows[:1])[1][0][3] == "1.65"  # a spread over one seed would be a lie
    rows[1]["curve"][-1][2] += 0.1
    assert results.summary(rows)[1][0][3] == "1.70 ± 0.07"  # of a sample: 0.1 over sqrt(2)
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    results.draw(rows, "plays", tmp_path / "none.png")
    axis = drawn[0].axes[0]
    assert axis.get_ylabel() == "dev loss" and list(axis.lines[0].get_ydata()) == [0.9, 0.5]


@pytest.mark.slow
@pytest.mark.ci
def test_workers_end_with_a_killed_comparison(tmp_path: Path):
    """Not after the run that they are in, whose row nobody waits for."""
    command = ["-m", "experiments.compare", "--task", "digits", "--method", "decomfl",
               "--learning-rate", "0.02", "--seeds", "1", "--vary", "rounds=1000000",
               "--out", str(tmp_path / "rows.jsonl")]  # fmt: skip
    parent = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("needs /proc")

    def worker() -> str | None:
        every = children.read_text().split()
        return next(
            (n for n in every if "spawn_main" in Path(f"/proc/{n}/cmdline").read_text()), None
        )

    end = time.monotonic() + 120
    while (number := worker()) is None and time.monotonic() < end:
        time.sleep(0.2)
    assert number is not None
    time.sleep(5)  # it has begun by then
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{number}").exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert not Path(f"/proc/{number}").exists()
