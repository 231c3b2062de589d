"""Settings for all tests: eight host devices, no silent broadcasting, and programs kept.

Programs are compiled without optimization and without the emitters that a CPU's loops are usually
written by, which takes half of the time. Jobs, notebooks and `test_portable`'s other programs have
all of that, one program of every row of `test_programs` has the emitters, and all of them must reach
the same bits.
"""

import hashlib
import importlib.util
import os
import platform
import re
from importlib import metadata
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
if metadata.version("jaxlib").startswith("0.10."):  # later ones do not know it, and would not start
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Most of the time goes into compiling. What a test, a job or a notebook has compiled, the next
# run of the suite need not compile again; machine code is kept apart by what it was made for.
cpu = Path("/proc/cpuinfo")
able = re.search(r"^(?:flags|Features)\s*:.*", cpu.read_text(), re.M) if cpu.exists() else None
kind = hashlib.sha256((able[0] if able else platform.processor()).encode()).hexdigest()[:8]
programs = Path(__file__).parents[1] / ".jax_cache" / f"xla-{kind}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(programs))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

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


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small decoder with a tokenizer of its own, as a Hugging Face folder."""
    from tests.helpers import tiny_model

    return tiny_model(tmp_path_factory.mktemp("opt"))
