"""`report.html`: whole, well-formed, without anything from elsewhere, whatever names are in a run."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiso_jax.train import page, report

NASTY = '<script>alert("x")</script> & $\\frac$ {braces} ü'
VOID = {"meta", "img", "br", "path", "use", "rect", "input"}


class Tags(html.parser.HTMLParser):
    """Every tag is closed in its turn."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any):
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")), value

    def handle_startendtag(self, tag: str, attrs: Any):
        self.seen.append(tag)

    def handle_endtag(self, tag: str):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str):
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a job leaves, with names as bad as they come, and a round of NaN."""
    rows: list[dict[str, Any]] = [{"round": 0, "dev_loss": 2.0, "dev_accuracy": 0.1}]
    for number in range(1, 9):
        row: dict[str, Any] = dict(round=number, loss=None if number == 3 else 2 - number / 10,
                                   clients=[NASTY, f"c{number}"], uplink_bytes=80 * number,
                                   seconds=0.1)  # fmt: skip
        if number % 4 == 0:
            row |= {"dev_loss": None if number == 4 else 1.5, "dev_accuracy": 0.5}
        rows.append(row)
    (tmp_path / "metrics.jsonl").write_text("".join(report.dumps(row) + "\n" for row in rows))
    summary = dict(
        method="hiso(update_steps=all)", task=NASTY, rounds=8, digest="00ff", learning_rate=0.1,
        clients=9, parameters=100, trained_parameters=10, metric="accuracy", accuracy=0.5,
        accuracy_before=0.1, uplink_bytes_per_client=71.0, downlink_bytes_per_client=1e4,
        fedavg_bytes_per_client=1e9, passes_per_round=6, shipped_bytes=900, seconds_per_round=0.1,
    )  # fmt: skip
    report.write_json(tmp_path / "summary.json", summary)
    report.write_json(tmp_path / "options.json", {"options": {"prompt": NASTY, "rounds": 8}})
    report.write_json(tmp_path / "labels.json", [{"label": NASTY, "word": "w", "train": 3}])
    keys = ("prompt", "wanted", "before", "written")
    report.write_json(tmp_path / "answers.json", [dict.fromkeys(keys, NASTY)])
    report.draw_split({}, {NASTY: 3, "c1": 2}, tmp_path / "split.png")
    return tmp_path


def test_a_page_is_whole(run: Path):
    path = page.write(run)
    tags = Tags()
    tags.feed(path.read_text())
    tags.close()
    assert not tags.open and "script" not in tags.seen and "link" not in tags.seen
    assert tags.seen.count("svg") == 6 and tags.seen.count("img") == 1
    for expected in ("00ff", "HiSo (update_steps=all)", "50.0%", "71 B", NASTY, "hiso replay"):
        assert expected in tags.text, expected
    assert tags.text.count(NASTY) >= 7  # title, heading, label, answers, prompt
    assert tags.seen.count("td") and "class=number" in path.read_text()  # of labels, not of unlike
    assert "<td>0.1</td>" in path.read_text() and "<td>6</td>" in path.read_text()
    assert "display: grid" in path.read_text()  # a picture alone in its line is not a wider one
    assert page.page(run) == path.read_text()  # the same run, the same page
    assert not list(run.glob("*.part*"))


def test_settings_are_those_that_were_used_without_paths(run: Path):
    given = {"task": "docstrings", "data": "/home/ann/wards.csv", "model": "/models/opt", "clients": 64,
             "split": "column", "client_column": "ward", "alpha": 1.0, "lora_rank": 8,
             "train": "all", "budget": 0.1, "select": None, "epsilon": None, "delta": 1e-5}  # fmt: skip
    report.write_json(run / "options.json", {"job": "finetune", "options": given})
    shown = page.page(run)
    assert "/home/ann" not in shown and "wards.csv" in shown and "/models" not in shown
    for name in ("clients", "alpha", "lora_rank", "budget", "delta"):
        assert f"<td>{name}</td>" not in shown.partition("<h2>Settings")[2], name
    assert "<td>client_column</td>" in shown and "hiso replay" in shown
    report.write_json(run / "options.json", {"job": "digits", "options": {"alpha": 0.5}})
    shown = page.page(run)  # which begins at random: there is no folder to replay onto
    assert "<td>alpha</td>" in shown and "hiso replay" not in shown


def test_masks_are_not_in_the_bytes(run: Path):
    assert "beside its masks" not in page.page(run)
    summary = json.loads((run / "summary.json").read_text())
    report.write_json(run / "summary.json", summary | {"secure": True})
    assert "sent by a client, beside its masks" in page.page(run)


def test_a_run_of_models_has_no_ledger_to_replay(run: Path):
    assert "hiso replay" in page.page(run)
    summary = json.loads((run / "summary.json").read_text())
    report.write_json(run / "summary.json", summary | {"method": "fedavg", "shipped_bytes": 0})
    shown = page.page(run)
    assert "hiso replay" not in shown and "the whole run as a file" not in shown


def test_a_loss_that_nobody_is_told_is_not_drawn(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    untold = [row | {"loss": None} if "loss" in row else row for row in rows]
    assert [page.rounds_of(x).count("<svg") for x in (rows, untold)] == [2, 1]


def test_many_clients_are_drawn_as_one():
    """Ten have bars and names; of thousands, all that were asked alike are one step."""
    few, many = ([{"clients": range(n)}, {"clients": range(n // 2)}] for n in (10, 20_000))
    assert page.participation(few).count("clip-path") > 10
    assert len(page.participation(many)) < 50_000


def test_without_what_not_every_run_has(run: Path):
    for name in ("labels.json", "answers.json", "split.png"):
        (run / name).unlink()
    summary = json.loads((run / "summary.json").read_text())
    report.write_json(run / "summary.json", summary | {"accuracy": None, "stopped": NASTY})
    tags = Tags()
    tags.feed(page.page(run))
    assert "not a number" in tags.text and "Predictions" not in tags.text
    assert tags.text.count(NASTY) >= 4 and "img" not in tags.seen


def screenshot(path: Path, width: int, folder: Path | None = None) -> np.ndarray:
    """What a browser shows of a file, [height, width, 3]; nothing may be said in the console."""
    from matplotlib import image

    folder = path.parent if folder is None else folder
    picture = folder / f"{path.stem}.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               "--disable-background-networking", f"--user-data-dir={folder / 'browser'}",
               f"--window-size={width},2400", f"--screenshot={picture}", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not re.search("CONSOLE", done.stderr), done.stderr
    return image.imread(picture)[..., :3]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_it(run: Path, width: int):
    """It opens, and the curves are there."""
    pixels = screenshot(page.write(run), width)
    blue, orange = np.array([0x1F, 0x77, 0xB4]) / 255, np.array([0xFF, 0x7F, 0x0E]) / 255
    for color in (blue, orange):  # of the curves; thin lines are blended with the white beside
        assert (np.abs(pixels - color).max(-1) < 0.35).sum() > 50
