"""The house: imports point downwards, files stay small, public names are documented."""

import ast
import inspect
import re
import sys
import tomllib
from pathlib import Path

import hiso_jax

ROOT = Path(__file__).parents[1]
# From the ground up; a module imports from lower floors only.
FLOORS = [
    {"exact", "checks", "files", "tensorfile"},
    {"trees", "lazy", "meshes", "prng"},
    {"packing", "fingerprint"},
    {"still"},
    {"directions"},
    {"estimators", "rules", "privacy"},
    {"aggregators", "split", "steps"},
    {"layout", "protocol"},
    {"algorithm"},
    {"algorithms", "transform", "header"},
    {"compact", "ledgerfile"},
    {"ledger"},
    {"pool", "replay", "server", "snapshots"},
    {"models", "tasks"},
    {"simulation"},
]
FLOOR = {module: level for level, floor in enumerate(FLOORS) for module in floor}


def imported(path: Path) -> set[str]:
    """First-level modules of hiso_jax that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("hiso_jax.")} & FLOOR.keys()


def test_imports_point_downwards():
    files = [p for p in (ROOT / "hiso_jax").rglob("*.py") if p != ROOT / "hiso_jax/__init__.py"]
    wrong = []
    for path in files:
        module = path.relative_to(ROOT / "hiso_jax").parts[0].removesuffix(".py")
        assert module in FLOOR, f"{module}: give it a floor"
        wrong += [
            f"{path}: {other}"
            for other in imported(path) - {module}
            if FLOOR[other] >= FLOOR[module]
        ]
    assert wrong == []


def test_files_stay_small():
    sources = [
        p
        for d in ("hiso_jax", "experiments", "tests", "benchmarks")
        for p in (ROOT / d).rglob("*.py")
    ]
    assert len(sources) > 20
    assert [str(p) for p in sources if len(p.read_text().splitlines()) > 420] == []


def test_what_is_imported_is_declared():
    """The algorithms need JAX and optax only; models and tasks bring what they need as extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = lambda text: re.split(r"[^\w-]", text)[0].replace("-", "_")  # noqa: E731
    core = {name(text) for text in project["dependencies"]}
    extra = {k: {name(t) for t in v} for k, v in project["optional-dependencies"].items()}
    for path in (ROOT / "hiso_jax").rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
        third = found - sys.stdlib_module_names - {"hiso_jax"}
        folder = path.relative_to(ROOT / "hiso_jax").parts[0]
        allowed = (
            core | extra.get(folder, set()) | ({"dp_accounting"} if "privacy" in folder else set())
        )
        assert third <= allowed, path


def test_public_names_are_documented():
    for name in hiso_jax.__all__:
        thing = getattr(hiso_jax, name)
        assert inspect.getdoc(thing), name
        members = vars(thing).items() if inspect.ismodule(thing) else ()
        for member, value in members:
            if inspect.isfunction(value) and value.__module__ == thing.__name__:
                if member.startswith("_"):
                    continue
                assert inspect.getdoc(value), f"{name}.{member}"
                assert "return" in inspect.get_annotations(value), f"{name}.{member}: annotate"


def test_torch_is_never_imported():
    for path in (ROOT / "hiso_jax").rglob("*.py"):
        assert "import torch" not in path.read_text(), path
