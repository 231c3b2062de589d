"""The snippets of every page run as they stand, one after the other."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = {page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}


LONG = {"your-model", "parameters"}


@pytest.mark.parametrize("page", [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow, pytest.mark.ci] * (page.stem in LONG))
    for page in PAGES if SNIPPETS[page]
])  # fmt: skip
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # they write files
    names: dict[str, object] = {}
    for snippet in SNIPPETS[page]:
        exec(compile(snippet, str(page), "exec"), names)
