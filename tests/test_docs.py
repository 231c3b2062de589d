"""The pages: every link inside of the clone leads somewhere, and every public name is in the reference."""

import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import hiso_jax
from tests.test_names import PAGES, ROOT, find

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EVERY = [*PAGES, ROOT / "CHANGELOG.md", *NOTEBOOKS]
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s#]*)(?:#([^)\s]+))?\)")
TREE = re.compile(r"```\{toctree\}\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^#{1,6} (.+)$", re.M)
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class|data):: ([\w.]+)$", re.M)


def text_of(page: Path) -> str:
    """The prose of a page: of a notebook its cells of text; code is none."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return prose(text)


def prose(text: str) -> str:
    """A text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a heading is called in an address, on a code host and by MyST."""
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", t) for t in HEADING.findall(text_of(page))]
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")  # noqa: E731
    return {slug(title) for title in titles}


def lost(page: Path, text: str) -> list[str]:
    """Links in the text of a page that lead nowhere."""
    out = []
    for name, anchor in LINK.findall(text):
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(ROOT):
            out.append(name)
        elif anchor and anchor not in anchors(target):
            out.append(f"{name}#{anchor}")
    return out


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path):
    assert lost(page, text_of(page)) == []


def test_a_link_that_leads_nowhere_is_found():
    text = """[a](data.md#labels) [b](data.md#none) [c](nowhere.md) [d](#splits) [e](https://x.org/y)
![f](drawings/none.svg)
```
[g](code.md)
```
"""
    wrong = ["data.md#none", "nowhere.md", "drawings/none.svg"]
    assert lost(ROOT / "docs" / "data.md", prose(text)) == wrong


def test_every_page_is_in_the_tree():
    """Whoever begins at docs/index.md finds them all."""
    seen, left = set(), [ROOT / "docs" / "index.md"]
    while left:
        page = left.pop()
        seen.add(page)
        for tree in TREE.findall(page.read_text()):
            lines = [line for line in tree.splitlines() if line and line[0] != ":"]
            names = [re.sub(r".*<(.+)>", r"\1", line) for line in lines]
            for name in names:
                found = [p for kind in (".md", ".ipynb")
                         if (p := (page.parent / f"{name}{kind}").resolve()).is_file()]  # fmt: skip
                assert len(found) == 1, name
                left += found
    assert {*EVERY} - seen == {ROOT / "README.md"}  # which is part of others


def public() -> dict[str, object]:
    """What people import: names of the package, and of its modules that say what is public."""
    found: dict[str, object] = {}
    modules = {
        name: getattr(hiso_jax, name)
        for name in ("federation", "ledger", "models", "secure", "selection")
    }
    for name in hiso_jax.__all__:
        thing = getattr(hiso_jax, name)
        if inspect.ismodule(thing):
            modules[name] = thing
        else:
            found[name] = thing
    for module, thing in modules.items():
        own = getattr(thing, "__all__", None) or own_names(thing)
        found |= {f"{module}.{name}": getattr(thing, name) for name in own}
    return found


def own_names(module: ModuleType) -> list[str]:
    """Functions and classes that a module without `__all__` defines."""
    kinds = (inspect.isfunction, inspect.isclass)
    return [name for name, thing in vars(module).items()
            if not name.startswith("_") and any(kind(thing) for kind in kinds)
            and thing.__module__ == module.__name__]  # fmt: skip


def test_the_reference_has_every_public_name():
    """By a directive, which takes its docstring; under another name of the same thing, too."""
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    listed = [name for text in pages for name in DIRECTIVE.findall(text)]
    assert len(listed) == len(set(listed))
    things = {id(find(name)) for name in listed}
    assert len(listed) > 150
    assert [name for name, thing in public().items() if id(thing) not in things] == []
