"""What a comparison keeps: rows of one data set, all that ended, and the best by what was asked."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiso_jax._engine import files
from hiso_jax.train import compare, comparison, curves, digits, grids, results
from tests.helpers import finish, start
from tests.test_compare import row


def test_data_are_told_apart_by_names_sizes_and_content(tmp_path: Path):
    (tmp_path / "a").mkdir()
    first = tmp_path / "a" / "train.csv"
    first.write_text("text,label\nx,1\n")
    marks = [files.fingerprint(tmp_path / "a"), files.fingerprint(first)]
    first.write_text("text,label\nx,2\n")
    marks.append(files.fingerprint(tmp_path / "a"))
    first.rename(tmp_path / "a" / "dev.csv")
    marks.append(files.fingerprint(tmp_path / "a"))
    assert len(set(marks)) == 4
    (tmp_path / "a" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "a").rename(tmp_path / "b")
    assert files.fingerprint(tmp_path / "b") == marks[-1]  # it may be elsewhere


def test_rows_of_other_data_are_not_shown_for_these(tmp_path: Path):
    """All runs are in the file: nothing is run, and what is there is of the data, or is refused."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    out, given = tmp_path / "rows.jsonl", dict(task="sst2", learning_rate=(0.1,), seeds=1)
    options: Any = compare.Compare(**given, data=tmp_path / "a", out=out)
    grid = compare.plan(options)
    wanted = [name for e in grid.entries for name, _ in grids.missing(e, grids.Found(grid, []))]
    came = row("hiso", 0.1, 0, [0.1, 0.5])
    came = {k: came[k] for k in list(came)[list(came).index("metric") :]}
    mark = {"data": files.fingerprint(tmp_path / "a")}
    out.write_text("".join(json.dumps(name | came | mark) + "\n" for name in wanted))
    assert len(compare.run(options)) == len(wanted) == 2
    for dry_run in (False, True):
        other: Any = compare.Compare(**given, data=tmp_path / "b", out=out, dry_run=dry_run)
        with pytest.raises(SystemExit, match="has these runs, of other data than .*b; give it a"):
            compare.run(other)
        other = compare.Compare(**given, data=tmp_path / "c", out=out, dry_run=dry_run)
        with pytest.raises(SystemExit, match="--data: .*c is not there"):
            compare.run(other)
    out.write_text("".join(json.dumps(name | came) + "\n" for name in wanted))
    assert len(compare.run(options)) == 2  # rows of before there were marks


def test_a_file_of_rows_is_never_written_over(tmp_path: Path):
    with pytest.raises(SystemExit, match="--out: .*is where the page would go"):
        compare.run(compare.Compare(out=tmp_path / "my.html"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("hiso", 1.0, 0, [0.1, 0.5]) | {"task": "digits"}) + "\n")
    for name in ("picture", "page"):
        given: Any = {name: path}
        with pytest.raises(SystemExit, match=f"--{name}: .*is a file of rows"):
            results.main(results.Results(rows=(path,), **given))
    assert len(curves.read(path)) == 1
    with pytest.raises(SystemExit, match="--only: expected any of 'hiso', got 'foo'"):
        results.main(results.Results(rows=(path,), only=("foo",)))
    with open(path, "a") as file:
        other = {"task": "llm", "text_task": "sst2"}
        file.write(json.dumps(row("hiso", 1.0, 0, [0.1, 0.5]) | other) + "\n")
    with pytest.raises(SystemExit, match="rows of one task, got those of digits, llm sst2"):
        results.main(results.Results(rows=(path,)))


def test_the_best_rate_is_the_best_by_what_was_asked():
    low, good = row("hiso", 0.01, 0, [0.1, 0.5]), row("hiso", 0.02, 0, [0.1, 0.9])
    low["curve"][-1][1], good["curve"][-1][1] = 1.0, 1.2
    third = row("hiso", 0.04, 0, [0.1, 0.3])
    for by, rate in (("loss", "0.01"), ("metric", "0.02")):
        third["curve"][-1][1] = 2.0
        every = [low, good, third]
        assert results.summary(every, chosen_by=by)[1][0][1].split()[0] == rate
        page = comparison.comparison([curves.DEFAULTS_OF_OLD_ROWS | {"task": "x"} | r
                                      for r in every], by)  # fmt: skip
        assert f"<td>{rate}" in page
        assert ("best dev metric" in page) == (by == "metric")


def test_an_edge_is_one_of_all_rates_also_where_the_best_has_more_seeds():
    every = [row("hiso", rate, 0, [0.1, end]) for rate, end in ((0.01, 0.9), (0.02, 0.5))]
    every.append(row("hiso", 0.01, 1, [0.1, 0.9]))
    assert results.summary(every)[1][0][1] == "0.01 (edge)"
    own = [curves.DEFAULTS_OF_OLD_ROWS | {"task": "x"} | r for r in every]
    assert "0.01 (edge)" in comparison.comparison(own)


def test_a_run_that_diverged_has_no_perplexity():
    good = row("decomfl", 1.0, 0, [0.1, 0.5]) | {"metric": "perplexity", "test": 16.4}
    good["curve"] = [[at, loss, float(np.exp(loss))] for at, loss, _ in good["curve"]]
    bad = good | {"method": "hiso", "diverged": True}
    _, lines = results.summary([good, bad])
    assert lines[0][0] == "DeComFL" and lines[0][4] == "16.40"
    assert lines[1][2:5] == ["inf", "inf", "inf"]
    both = [bad, bad | {"seed": 1}]
    assert results.summary(both)[1][0][3:5] == ["inf", "inf"]


@pytest.mark.slow
@pytest.mark.ci
def test_a_round_that_nobody_answered_is_no_divergence():
    options = digits.Options(method="decomfl", rounds=8, clients_per_round=1, dropout=0.6,
                             learning_rate=0.01, eval_every=8)  # fmt: skip
    found = compare.one("digits", options)
    assert not found["diverged"] and found["curve"][-1][0] == 8


@pytest.mark.slow
@pytest.mark.ci
def test_an_interrupt_ends_it_at_once_and_keeps_what_has_ended(tmp_path: Path):
    """As by Ctrl-C in a terminal, which reaches the workers, too."""
    out = tmp_path / "rows.jsonl"
    process = start(
        "compare", "--task", "digits", "--method", "decomfl", "--learning-rate", "0.02",
        "--seeds", "3", "--vary", "rounds=1,1000000", "--out", str(out),
        environment=dict(os.environ), start_new_session=True,
    )  # fmt: skip
    end = time.monotonic() + 240
    while len(curves.read(out)) < 3 and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    said = finish(process, 1)
    assert time.monotonic() - began < 20
    assert "stopped; 3 runs are in" in said and "Traceback" not in said
    assert len(curves.read(out)) == 3
