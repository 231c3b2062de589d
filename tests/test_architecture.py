"""The house: imports point downwards, files stay small, public names are documented."""

import ast
import inspect
import re
import sys
import tomllib
from pathlib import Path

import hiso_jax

ROOT = Path(__file__).parents[1]
# Folders from the ground up, and the question that each answers; one imports from those above it.
ROWS = {
    "_engine": "how is it computed?",
    "models": "what is fine-tuned?",
    "": "what is the algorithm?",
    "selection": "which examples are learned from?",
    "privacy": "how much is given away?",
    "secure": "what does the server see?",
    "ledger": "what stays of a run?",
    "federation": "who takes part?",
    "tasks": "what is learned, from which data?",
    "train": "what do people run?",
    "nvflare": "how do real clients take part?",
}
SOURCES = [p for p in (ROOT / "hiso_jax").rglob("*.py") if p != ROOT / "hiso_jax/__init__.py"]


def name_of(path: Path) -> str:
    """A file as a module is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """The folder of a module of hiso_jax; of those of the top level, none."""
    first = module.split(".")[1]
    return first if (ROOT / "hiso_jax" / first).is_dir() else ""


MODULES = {name_of(path) for path in SOURCES}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Modules of hiso_jax that a file imports; or those that it needs to be imported itself."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES
            names |= inside or {node.module}
    return names & MODULES


def test_folders_import_from_those_below():
    order = list(ROWS)
    assert {folder_of(module) for module in MODULES} == {*order}
    wrong = [
        f"{path}: {other}"
        for path in SOURCES
        for other in imported(path)
        if order.index(folder_of(other)) > order.index(folder_of(name_of(path)))
    ]
    assert wrong == []


def test_no_module_needs_itself():
    """Not through others either."""
    needs = {name_of(path): imported(path, everywhere=False) for path in SOURCES}
    # A package's __init__ names what is in it; what is in it does not need the names.
    needs = {k: v - {k.rpartition(".")[0]} for k, v in needs.items()}
    while free := [module for module, others in needs.items() if not others & needs.keys()]:
        for module in free:
            del needs[module]
    assert needs == {}


def test_files_stay_small():
    sources = [
        p
        for d in ("hiso_jax", "experiments", "tests", "benchmarks")
        for p in (ROOT / d).rglob("*.py")
    ]
    assert len(sources) > 20
    assert [str(p) for p in sources if len(p.read_text().splitlines()) > 420] == []


# What people call, with options by keyword, and a layer that is made by its sizes.
FRONT_DOORS = {
    "hiso_jax.algorithms.scalar_algorithm",
    "hiso_jax.federation.rounds.run",
    "hiso_jax.models.layers.Attention.__init__",
    "hiso_jax.transform.hiso",
}


def functions(path: Path) -> list[tuple[str, ast.FunctionDef]]:
    """All functions of a file by their full names, those inside of others too."""
    found: list[tuple[str, ast.FunctionDef]] = []

    def look(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.ClassDef)
            inner = f"{name}.{child.name}" if inside else name
            if isinstance(child, ast.FunctionDef):
                found.append((inner, child))
            look(child, inner)

    look(ast.parse(path.read_text()), name_of(path))
    return found


def test_functions_stay_small():
    """At most 100 lines without the docstring, and eight parameters except at front doors."""
    long, wide, doors = [], [], set()
    for name, node in (pair for path in SOURCES for pair in functions(path)):
        lines = (node.end_lineno or 0) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
        long += [f"{name}: {lines} lines"] * (lines > 100)
        given = node.args
        stars = [x for x in (given.vararg, given.kwarg) if x]
        count = len(given.posonlyargs + given.args + given.kwonlyargs + stars)
        if count > 8:
            doors.add(name)
            wide += [f"{name}: {count} parameters"] * (name not in FRONT_DOORS)
    assert (long, wide) == ([], [])
    assert doors == FRONT_DOORS  # none is listed in vain


def test_what_is_imported_is_declared():
    """The algorithms need JAX and optax only; models and tasks bring what they need as extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = lambda text: re.split(r"[^\w-]", text)[0].replace("-", "_")  # noqa: E731
    core = {name(text) for text in project["dependencies"]}
    extra: dict[str, set[str]] = {"_engine": set()}
    for folder in ("models", "tasks", "train", "nvflare"):  # each brings those before it
        brought = project["optional-dependencies"][folder]
        extra[folder] = set().union(*extra.values()) | {name(text) for text in brought}
    for path in SOURCES:
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
        third = found - sys.stdlib_module_names - {"hiso_jax"}
        third = {{"PIL": "pillow"}.get(name, name) for name in third}
        brought = extra.get(folder_of(name_of(path)), set())
        watching = {"tensorboardX"} if path.stem == "logs" else set()
        dp = {"dp_accounting"} if folder_of(name_of(path)) == "privacy" else set()
        # Shapes take the place of what jaxtyping would bring, unless that is there.
        secure = {"cryptography"} if folder_of(name_of(path)) == "secure" else set()
        shapes = {"jaxtyping"} if path.stem == "shapes" else set()
        assert third <= core | brought | dp | secure | shapes | watching, path


def test_the_lock_has_what_is_declared():
    """A version of everything that development needs, and no word of where it comes from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [
        x for n in ("train", "test", "lint", "docs") for x in extras[n]
    ]
    name = lambda text: re.split(r"[^\w-]", text)[0].lower().replace("_", "-")  # noqa: E731
    lock = (ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([\w.-]+)==", lock, re.M))
    assert {name(x) for x in wanted} - {"hiso-jax"} <= pinned
    assert "://" not in lock and "index" not in lock


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.+)$", citation, re.M) == [version]
    (date,) = re.findall(r"^date-released: (.+)$", citation, re.M)
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert next(h for h in headings if h != "Unreleased") == f"{version} - {date}"


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
