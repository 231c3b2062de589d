"""The site: `make docs` writes it to docs/_build/html. The sources are the whole clone's pages.

Sphinx's source folder is the root of the clone, so that pages, notebooks, README and CHANGELOG are
read where they lie, and a link that works on a code host works on the site.
"""

import functools
import inspect
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

typing.GENERATING_DOCUMENTATION = "hiso_jax"  # pyright: ignore  # short names for jaxtyping
import jax  # noqa: E402
import jaxtyping  # noqa: E402, F401  # before hiso_jax: shapes are then Float[Array, "C K P"]

jax.Array.__module__ = "builtins"

ROOT = Path(__file__).parents[1]

project = "hiso_jax"
author = "the hiso_jax authors"
copyright = f"2026, {author}"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "notebooks/*.ipynb",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["docs/_build", "**/.ipynb_checkpoints"]

html_theme = "furo"
html_title = f"hiso_jax {version}"
html_theme_options = {"top_of_page_buttons": []}
html_css_files = ["site.css"]
html_static_path = ["site"]
html_extra_path = ["front"]  # index.html, which leads to docs/index.html
html_show_sourcelink = html_show_copyright = False
html_copy_source = False

myst_heading_anchors = 4
myst_links_external_new_tab = False

nb_execution_mode = "cache"  # a notebook runs again when it has changed; make slow runs all
nb_execution_cache_path = str(ROOT / ".jax_cache" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_preprocess_types = False
default_role = "py:obj"  # what it finds becomes a link, other text code
suppress_warnings = ["ref.python"]  # of names such as an argument's, which several things have
add_module_names = False


def _fields(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Say of a field what the comment beside it says; keep napoleon from reading text as types."""
    del app, options, thing
    if lines and lines[0].startswith("Alias for field number"):
        lines[:] = [_comment(*name.rsplit(".", 1)), ""]
    elif what == "attribute" and lines and ":" in lines[0]:
        lines[0] = ": " + lines[0]  # it takes what comes before the first colon for a type


def _comment(owner: str, field: str) -> str:
    """The comment behind a field of a named tuple in its source."""
    import hiso_jax

    kind: Any = hiso_jax
    for part in owner.split(".")[1:]:  # an attribute may be a module under another name
        kind = getattr(kind, part)
    source = inspect.getsource(kind)
    found = re.search(rf"^    {field}: .*?  # (?!pyright)(.+)$", source, re.M)
    return found[1].rpartition("  # ")[2] if found else ""


@functools.cache
def _aliases() -> list[tuple[str, str]]:
    """Long types as autodoc writes them, and what the source calls them; the longest first."""
    import optax
    from sphinx.util.typing import stringify_annotation

    from hiso_jax import aggregators, estimators
    from hiso_jax._engine import shapes, trees

    kinds = {"ScalarOrSchedule": optax.ScalarOrSchedule, "Difference": estimators.Difference,
             "Leaves": trees.Leaves, "Index": shapes.Index, "Number": shapes.Number,
             "SomeKey": shapes.SomeKey, "ArrayLike": shapes.ArrayLike, "LossFn": estimators.LossFn,
             "Function": aggregators.Function}  # fmt: skip
    pairs = [(stringify_annotation(kind, "smart"), name) for name, kind in kinds.items()]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _short(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str, to: str
) -> Any:
    """Types and paths in a signature as a reader knows them."""
    del app, what, name, thing, options

    def read(text: str) -> str:
        for long, short in _aliases():
            text = text.replace(long, short)
        text = text.replace("~jaxlib._jax.Array", "Array").replace("jaxlib._jax.Array", "Array")
        return re.sub(r"(?:Posix)?Path\(('[^']*')\)", r"\1", text)

    return signature and (read(signature), to and read(to))


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("autodoc-process-docstring", _fields, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _short)
