"""The site: `make docs` writes it to docs/_build. The sources are the whole clone's pages.

Sphinx's source folder is the root of the clone, so that pages, notebooks, README and CHANGELOG are
read where they lie, and a link that works on a code host works on the site.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import jaxtyping  # noqa: F401  # before hiso_jax: shapes are then shown as Float[Array, "C K P"]

ROOT = Path(__file__).parents[1]

project = "hiso_jax"
author = "the hiso_jax authors"
copyright = f"2026, {author}"
release = version = importlib.metadata.version("hiso-jax")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "notebooks/*.ipynb", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
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

nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / ".jax_cache" / "notebooks")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_preprocess_types = False
default_role = "py:obj"
add_module_names = False
