"""The site that `make docs` has built: what is in it, and that a browser has nothing to say of it."""

import shutil
import zlib
from pathlib import Path

import pytest

from tests.test_docs import public
from tests.test_names import ROOT
from tests.test_page import screenshot

SITE = ROOT / "docs" / "_build" / "html"
LOOKED_AT = ("docs/index", "docs/concepts", "docs/results", "docs/reference/algorithms",
             "notebooks/02_compare", "CHANGELOG")  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "objects.inv").exists(), reason="make docs builds the site"),
]


def test_every_public_name_has_a_place_to_link_to():
    """In the inventory by which other projects link here."""
    head, _, packed = (SITE / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert b"Project: hiso_jax" in head
    names = {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}
    last = {name.rpartition(".")[2] for name in names}
    assert [name for name in public() if name.rpartition(".")[2] not in last] == []
    assert {
        "hiso_jax.scalar_algorithm",
        "hiso_jax.rules.rms",
        "hiso_jax.federation.Clients",
    } <= names


def test_no_page_loads_anything_from_elsewhere():
    pages = [*SITE.rglob("*.html")]
    assert len(pages) > 35
    for page in pages:
        text = page.read_text()
        for what in (
            '<script src="http',
            '<link rel="stylesheet" type="text/css" href="http',
            "mathjax",
        ):
            assert what not in text, page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_a_browser_shows_it(page: str, width: int, tmp_path: Path):
    """With text on it, and nothing in the console."""
    pixels = screenshot(SITE / f"{page}.html", width, tmp_path)
    assert (pixels < 0.5).all(-1).sum() > 5000
