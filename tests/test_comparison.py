"""`compare.html`: whole, without anything from elsewhere, and its check boxes rule its curves."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hiso_jax.train import comparison, curves
from tests.test_page import NASTY, Tags, screenshot

METHODS = ("hiso", "decomfl", "rms", f"mine:{NASTY}")


def rows(task: str = "digits", methods: tuple[str, ...] = METHODS) -> list[dict[str, Any]]:
    """Two seeds at three rates each; the lowest rate is the second method's best, one run diverged."""
    out = []
    for m, method in enumerate(methods):
        for r, rate in enumerate((0.01, 0.02, 0.04)):
            for seed in (0, 1):
                end = 0.3 + 0.1 * m + 0.05 * (r if m == 1 else abs(r - 1)) + 0.01 * seed
                curve = [[0, 2.0, 0.1], [5, 1.0, 0.5], [10, end, 0.9 - 0.1 * m]]
                broken = (m, r, seed) == (2, 2, 1)
                out.append(dict(
                    task=task, method=method, learning_rate=rate, seed=seed, rounds=10,
                    num_perturbations=5, metric="accuracy", curve=curve, test_loss=end, test=0.8,
                    diverged=broken, passes_per_round=6, bytes_per_round=20, seconds=3.0,
                ))  # fmt: skip
    return [curves.DEFAULTS_OF_OLD_ROWS | row for row in out]


def test_the_page_is_whole(tmp_path: Path):
    path = tmp_path / "compare.html"
    comparison.write(rows() + rows(f"two {NASTY}", METHODS[:2]), path)
    text = path.read_text()
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert not tags.open and "script" not in tags.seen and "link" not in tags.seen
    assert tags.seen.count("svg") == 2 * 4 + 6  # pictures, and a piece of each method's line
    assert tags.seen.count("input") == 6
    for expected in ("HiSo", "DeComFL / rms", NASTY, "0.01 (edge)", "0.305 ± 0.007", "36 runs"):
        assert expected in tags.text, expected
    assert comparison.comparison(rows()) == comparison.comparison(rows())
    assert [p.name for p in tmp_path.iterdir()] == ["compare.html"]


def test_every_curve_has_a_box_that_rules_it():
    text = comparison.comparison(rows())
    boxes = re.findall(r'<input type="checkbox" id="([^"]+)" checked>', text)
    curves = re.findall(r'<g id="(m0-\d+)-\d+">', text)
    assert len(boxes) == len(METHODS) == len(set(boxes))
    assert {name: curves.count(name) for name in boxes} == dict.fromkeys(boxes, 3 * 2 * 2 + 1)
    names = re.findall(r'id="(m0-[^"]+)"', text)
    assert len(names) == len(set(names))
    for box in boxes:
        assert f"body:has(#{box}:not(:checked)) [id^='{box}-']" in text


def test_of_very_many_the_best_are_shown():
    many = tuple(f"mine:m{i:02}" for i in range(12))
    text = comparison.comparison(rows(methods=(*many, "decomfl", "hiso")))
    assert text.count('type="checkbox"') == 14 and text.count(" checked>") == comparison.SHOWN + 2


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows: there are none"):
        comparison.comparison([])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_those_that_are_checked(tmp_path: Path, width: int):
    path = tmp_path / "compare.html"
    comparison.write(rows(methods=METHODS[:2]), path)
    text = path.read_text()
    everything = screenshot(path, width)
    path.write_text(text.replace('id="m0-1" checked', 'id="m0-1"'))
    one = screenshot(path, width)
    blue, orange = np.array([0x1F, 0x77, 0xB4]) / 255, np.array([0xFF, 0x7F, 0x0E]) / 255

    def count(pixels: np.ndarray, color: np.ndarray) -> int:
        return int((np.abs(pixels - color).max(-1) < 0.2).sum())

    assert min(count(everything, blue), count(everything, orange)) > 300
    assert count(one, blue) > 300 and count(one, orange) < 0.3 * count(everything, orange)
