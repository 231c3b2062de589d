"""Settings for all tests: eight host devices, no silent broadcasting, and programs kept.

Programs are compiled without optimization and without the emitters that a CPU's loops are usually
written by, which takes half of the time. The jobs of `test_resume`, notebooks and `test_portable`'s
other programs have all of that, one program of every row of `test_programs` has the emitters, and
all of them must reach the same bits.
"""

import gc
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if metadata.version("jaxlib").startswith("0.10."):  # others may not know them, and would not start
    # One module of machine code a program: split in many, programs this small cost more.
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
# torch's threads wait for each other by spinning, for models that one thread has done with sooner.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the time goes into compiling. What a test, a job or a notebook has compiled, the next
# run of the suite need not compile again; machine code is kept apart by what it was made for.
cpu = Path("/proc/cpuinfo")
able = re.search(r"^(?:flags|Features)\s*:.*", cpu.read_text(), re.M) if cpu.exists() else None
kind = hashlib.sha256((able[0] if able else platform.processor()).encode()).hexdigest()[:8]
programs = Path(__file__).parents[1] / ".jax_cache" / f"xla-{kind}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Ledgers wait for the disk after every round, which counts when the power fails, and no test does
# that: where a file system in memory has room, the tests' files are there.
memory = Path("/dev/shm")
if memory.is_dir():
    room = os.statvfs(memory)
    if room.f_bavail * room.f_frsize > 4 << 30 and not room.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

import jax  # noqa: E402  # after what it reads
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the examples of modules whose extra is not installed."""
    if importlib.util.find_spec("cryptography") and importlib.util.find_spec("Crypto"):
        return
    for item in items:
        if item.name.startswith(("hiso_jax.secure", "hiso_jax.federation.private")):
            item.add_marker(pytest.mark.skip(reason="needs the extra secure"))


def pytest_collection_finish() -> None:
    """What is imported by now stays, and tracing makes a million objects a minute: look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with a tokenizer of its own, as a Hugging Face folder."""
    from tests.helpers import tiny_model

    return tiny_model(tmp_path_factory.mktemp("opt"))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose pictures nobody looks at."""
    from tests.helpers import draw_nothing

    draw_nothing(monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 200 kB, which `helpers.remount` makes another one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs the right to")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
