"""Peak memory of loading a checkpoint, over one copy of its parameters.

python -m benchmarks.loading
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
AutoConfig.from_pretrained(sys.argv[1])
def peak():
    line = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0]
    return int(line.split()[1]) * 1024
jax.numpy.ones(3).block_until_ready()
before = peak()
params = jax.block_until_ready(models.from_pretrained(sys.argv[1]).params)
print(peak() - before, sum(x.nbytes for x in trees.named(params).values()))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """Memory while loading an OPT of random weights."""

    width: int = 768
    """Hidden width."""
    layers: int = 12
    """Layers; with the default width and vocabulary, OPT-125M's shape."""
    vocabulary: int = 50272
    """Tokens."""


def main(options: Options) -> None:
    """Write a checkpoint, load it in a process of its own, and print the ratio."""
    from transformers import OPTConfig

    from hiso_jax import models

    config = OPTConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, word_embed_proj_dim=options.width,
        ffn_dim=4 * options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        models.save_pretrained(models.from_config(config, jax.random.key(0)), path)
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True
        )
    grown, size = map(int, done.stdout.split())
    Console().print(timing.machine())
    Console().print(
        f"{size / 2**20:.0f} MiB of parameters: loading grew the process by at most "
        f"{grown / 2**20:.0f} MiB, {grown / size:.2f} copies"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
