"""Peak memory of loading a checkpoint, over one copy of its parameters.

python -m benchmarks.loading
python -m benchmarks.loading --model MODEL.gguf
"""

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
from rich.console import Console

from benchmarks import timing

LOAD = """
import jax, sys
from hiso_jax import models, trees
from transformers import AutoConfig
import gguf
AutoConfig.for_model("llama")
def peak():
    line = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
    return int(line.split()[1]) * 1024
jax.numpy.ones(3).block_until_ready()
before = peak()
params = jax.block_until_ready(models.from_pretrained(sys.argv[1], sys.argv[2]).params)
print(peak() - before, sum(x.nbytes for x in trees.named(params).values()))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Memory while loading an OPT of random weights, or a model that is there."""

    model: Path | None = None
    """A folder or GGUF file."""
    dtype: str = "float32"
    """Of the parameters: float32, bfloat16, float16."""
    width: int = 768
    """Hidden width."""
    layers: int = 12
    """Layers; with the default width and vocabulary, OPT-125M's shape."""
    vocabulary: int = 50272
    """Tokens."""


def measure(path: Path, dtype: str = "float32") -> tuple[int, int]:
    """Load a model in a process of its own: bytes it grew by at most, bytes of its parameters."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path), dtype], capture_output=True, text=True, check=True
    )
    grown, size = map(int, done.stdout.split())
    return grown, size


def random_model(options: Options, path: Path) -> None:
    """Write a checkpoint."""
    from transformers import OPTConfig

    from hiso_jax import models

    config = OPTConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, word_embed_proj_dim=options.width,
        ffn_dim=4 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
    )  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), path)


def main(options: Options) -> None:
    """Load a model in a process of its own, and print the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            random_model(options, Path(folder))
        grown, size = measure(options.model or Path(folder), options.dtype)
    Console().print(timing.machine())
    Console().print(
        f"{size / 2**20:.0f} MiB of parameters: loading grew the process by at most "
        f"{grown / 2**20:.0f} MiB, {grown / size:.2f} copies"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
