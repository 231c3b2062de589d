"""Does the learned curvature help where the theory says it should? A quadratic with known answer.

``f(x) = 1/2 sum_i s_i x_i^2`` with a diagonal curvature s of low effective rank. HiSo's rate
depends on the whitening rank zeta = Tr(H^-1/2 S H^-1/2), DeComFL's on L kappa = Tr(S), with
kappa = Tr(S) / max s (arXiv 2506.02370, Theorem 1). Both methods, and HiSo given the true
curvature (which no real run has), get the same grid of learning rates and the same seeds.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import hiso_jax as hj

GRID = tuple(float(f"{x:.3g}") for x in np.geomspace(1e-3, 3.0, 15))
TARGET = 0.01


def curvature(dimension: int) -> np.ndarray:
    """s_i = 1 / i^1.5: a few stiff directions, many soft ones."""
    return 1.0 / np.arange(1, dimension + 1) ** 1.5


def oracle(s: jax.Array) -> hj.rules.Rule:
    """HiSo with H fixed at the true curvature."""
    rule = hj.rules.hiso(decay=1.0)
    return rule._replace(init=lambda leaves: hj.rules.HisoState({"x": s.astype(jnp.float32)}))


def run(rule: hj.rules.Rule, dimension: int, rounds: int, rate: Any, seed: Any) -> Any:
    """Loss after every round, relative to the start, and the final rule state."""
    s = jnp.asarray(curvature(dimension), jnp.float32)
    loss_fn = lambda params, batch: 0.5 * (s * params["x"] ** 2).sum() + 0 * batch.sum()  # noqa: E731
    alg = hj.scalar_algorithm(loss_fn, lambda r: rate, rule=rule, num_perturbations=5)
    state = alg.init({"x": jnp.ones(dimension)}, jax.random.key(seed))

    def step(state: Any, _: Any) -> Any:
        state, metrics = alg.round(state, jnp.zeros((1, 1, 1)))
        return state, metrics.loss

    end, losses = jax.lax.scan(step, state, None, length=rounds)
    return losses / losses[0], end.rule


def compare(dimension: int = 200, rounds: int = 3000, seeds: int = 5) -> dict[str, dict[str, Any]]:
    """Best of the grid for each rule: rounds to 1 % of the initial loss, median of the seeds."""
    s = jnp.asarray(curvature(dimension))
    rules = {
        "DeComFL": hj.rules.identity(),
        "HiSo": hj.rules.hiso(),
        "HiSo, true curvature": oracle(s),
    }
    results = {}
    for name, rule in rules.items():
        one = lambda rate, seed, rule=rule: run(rule, dimension, rounds, rate, seed)  # noqa: E731
        every = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))
        losses, state = every(jnp.float32(GRID), jnp.arange(seeds))
        below = np.asarray(losses) < TARGET
        needed = np.where(below.any(-1), below.argmax(-1), np.inf)  # [rates, seeds]
        median = np.median(needed, axis=1)
        best = int(median.argmin())
        h = np.asarray(state.curvature["x"][best, 0]) if state != () else np.ones(dimension)
        results[name] = dict(
            learning_rate=GRID[best], rounds=float(median[best]), 
            zeta=float((np.asarray(s) / h).sum()),
            spread=(float(needed[best].min()), float(needed[best].max())),
            correlation=float(np.corrcoef(np.log(h), np.log(s))[0, 1]) if h.std() > 0 else 0.0,
        )  # fmt: skip
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--dimension", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3000)
    args = parser.parse_args()
    s = curvature(args.dimension)
    title = (
        f"d = {args.dimension}, kappa = {s.sum() / s.max():.2f}, L kappa = Tr(S) = {s.sum():.2f}"
    )
    table = Table("", "best rate", "rounds to 1 %", "min - max", "zeta", "corr(H, S)", title=title)
    for name, r in compare(args.dimension, args.rounds).items():
        low, high = r["spread"]
        cells = (
            r["learning_rate"],
            r["rounds"],
            f"{low:g} - {high:g}",
            r["zeta"],
            r["correlation"],
        )
        table.add_row(name, *(c if isinstance(c, str) else f"{c:.3g}" for c in cells))
    Console().print(table)


_Help = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
