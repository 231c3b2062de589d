"""What pages and docstrings name is there: files, folders, modules and what is in them."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("hiso_jax", "experiments", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)}|tests|docs|notebooks)/[\w./-]*\w")
NAME = re.compile(r"(?<![\w/.-])(?:hj|hiso_jax|benchmarks)(?:\.[A-Za-z_]\w*)+")
JOB = re.compile(r"(?<![\w/.-])experiments(?:\.[a-z_]\w*)+")


def docstrings(path: Path) -> str:
    """The docstrings of a file, and the texts that stand below its constants."""
    lines = [node.value for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.Expr)]  # fmt: skip
    texts = [line.value for line in lines if isinstance(line, ast.Constant)]
    return "\n".join(text for text in texts if isinstance(text, str))


def find(name: str) -> object:
    """What a dotted name stands for; an error if it is nothing."""
    first, *rest = name.split(".")
    path = {"hj": "hiso_jax"}.get(first, first)
    thing = importlib.import_module(path)
    for part in rest:
        path += "." + part
        thing = getattr(thing, part, None) or importlib.import_module(path)
    return thing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_of_pages(path: Path):
    text = path.read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    for name in {*NAME.findall(text), *JOB.findall(text)}:
        assert find(name) is not None, name


def test_of_docstrings():
    """Of all sources in one test: they are many, and quickly read."""
    names: dict[str, Path] = {}
    for path in SOURCES:
        text = docstrings(path)
        lost = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
        assert lost == [], path
        names |= dict.fromkeys(NAME.findall(text), path)
    assert len(names) > 40
    for name, path in names.items():
        try:
            find(name)
        except ImportError as error:
            raise AssertionError(f"{path.relative_to(ROOT)} names {name}: {error}") from None


def test_a_name_that_is_nothing_is_found_out():
    assert FILE.findall("`docs/models.md`, (tests/helpers.py).") == [
        "docs/models.md", "tests/helpers.py",
    ]  # fmt: skip
    assert NAME.findall("of `hiso_jax.rules.RULES`.") == ["hiso_jax.rules.RULES"]
    for gone in ("hiso_jax.updates", "hj.rules.none_of_these", "hiso_jax.rules.rms.none"):
        with pytest.raises(ImportError):
            find(gone)
