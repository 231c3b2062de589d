"""What a random number costs: drawn, scaled and added to weights that a cache holds.

python -m benchmarks.noise
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

import hiso_jax as hj
from benchmarks import timing
from hiso_jax import directions
from hiso_jax._engine import exact


@dataclasses.dataclass(frozen=True)
class Options:
    """Nanoseconds a number of each distribution."""

    numbers: int = 2**18
    """Numbers at a time."""
    times: int = 50
    """Directions drawn in a program."""
    repeats: int = 9
    """Times that each program is timed, in turns."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""


def measure(options: Options) -> dict[str, float]:
    """Nanoseconds a number, by distribution."""

    def program(law: directions.Distribution) -> jax.stages.Wrapped:
        def run(x: jax.Array, key: jax.Array) -> jax.Array:
            def add(p: jax.Array, x: jax.Array) -> jax.Array:
                noise = directions.draw(jax.random.fold_in(key, p), x.shape, law)
                return exact.axpy(x, 1e-3, noise)

            return jax.lax.fori_loop(0, options.times, add, x)

        return jax.jit(run, compiler_options=hj.compiler_options())

    x, key = jnp.ones(options.numbers, options.dtype), jax.random.key(0)
    each = {law: program(law) for law in get_args(directions.Distribution)}
    calls = {law: lambda run=run: run(x, key) for law, run in each.items()}
    seconds = timing.interleaved(calls, options.repeats)
    return {law: 1e9 * s / options.numbers / options.times for law, s in seconds.items()}


def main(options: Options) -> None:
    """Measure and print."""
    from rich.console import Console
    from rich.table import Table

    found = measure(options)
    table = Table("noise", "ns a number", "of normal")
    for law, each in found.items():
        table.add_row(law, f"{each:.2f}", f"{each / found['normal']:.2f}")
    console = Console()
    console.print(timing.machine())
    console.print(table)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
