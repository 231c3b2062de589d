"""The digest's share of a round's `advance`.

python -m benchmarks.digest
"""

import dataclasses

import jax
import jax.numpy as jnp

import hiso_jax as hj
from benchmarks import timing
from hiso_jax import directions


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of the digest against that of `advance`, on a stack of transformer-like leaves."""

    layers: int = 6
    """Layers of 12 width^2 parameters."""
    width: int = 384
    """Width; the vocabulary has 30,522 rows."""
    distribution: directions.Distribution = "rademacher"
    """Rademacher is the hard case: its noise costs least."""
    repeats: int = 15
    """Times that each is timed, in turns."""


def measure(options: Options) -> dict[str, float]:
    """Seconds of `advance` and of the digest, and bytes of what is fingerprinted."""
    n, w = options.layers, options.width
    shapes = [(30522, w), (n, w, 4 * w), (n, 4 * w, w), (n, w, w), (n, w, w), (n, w, w), (n, w, w)]
    params = {f"leaf{i}": jnp.zeros(shape) for i, shape in enumerate(shapes)}
    alg = hj.federated_hiso(
        lambda params, batch: jnp.float32(0), 1e-3, distribution=options.distribution
    )
    states = [alg.init(params, jax.random.key(0))]
    advance = jax.jit(alg.advance, donate_argnums=0, compiler_options=hj.compiler_options())
    record = jnp.ones((1, 5))

    def step() -> hj.State:
        states[0] = advance(states[0], record)
        return states[0]

    times = timing.interleaved(
        {"advance": step, "digest": lambda: hj.digest(states[0])}, options.repeats
    )
    size = sum(x.size for x in jax.tree.leaves(params))
    held = sum(x.nbytes for x in jax.tree.leaves(hj.fingerprint.content(states[0])))
    return times | {"parameters": size, "bytes": held}


def main(options: Options) -> None:
    """Measure and print."""
    from rich.console import Console

    found = measure(options)
    console = Console()
    console.print(timing.machine())
    console.print(
        f"{found['parameters']:,} parameters, {options.distribution} noise, P = 5: advance "
        f"{1e3 * found['advance']:.1f} ms, digest {1e3 * found['digest']:.1f} ms, "
        f"{found['digest'] / found['advance']:.1%}"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options))
