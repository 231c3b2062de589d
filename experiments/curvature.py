"""What HiSo's H has to do with curvature, and what limits a step: measured on a small network.

Trains the digits' CNN with HiSo and, at a few rounds, compares the learned H with the whole
Hessian, which 4,610 parameters allow. The theory's condition is on the whitening rank
``zeta = tr(H^-1/2 |Hessian| H^-1/2)``; without H it is ``tr |Hessian|``, the effective rank
``kappa = tr / max`` times the largest curvature.

What a preconditioner D buys does not depend on its scale: with noise of covariance D a round's
best expected decrease is ``P (g' D g)^2 / (2 (g_b' D g_b) tr(D Hessian))``, with g the gradient
and g_b that of a round's batch. ``gain`` is that over the same with D = 1. And if each of the C
clients has P directions of its own, P and g_b' g_b become C P and the mean over clients of
theirs, so that their gain is C times the one over the other.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import hiso_jax as hj
from experiments import lanczos
from hiso_jax import federation
from hiso_jax._engine import trees
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import report, results
from hiso_jax.train.digits import digits

SOME = 400
"""Training examples of which the Hessian is, of 1,257."""


@dataclasses.dataclass(frozen=True)
class Curvature:
    """Measure H against the Hessian while HiSo trains the digits' network."""

    rounds: tuple[int, ...] = (0, 20, 100, 300, 600)
    """When to look."""
    learning_rate: float = 2e-2
    """Of HiSo, constant."""
    decay: float = 0.95
    """Weight of the old H."""
    seed: int = 0
    """Of noise and clients."""
    out: Path = Path("runs/curvature.json")
    """Where the figures go."""
    picture: Path | None = None
    """Where to draw H against curvature at the last round, a PNG."""


def everything(problem: Problem) -> dict[str, jax.Array]:
    """All training examples in one batch."""
    joined = {k: jnp.asarray(v) for k, v in problem.clients.columns.items()}
    return joined | {"weight": jnp.ones(len(joined["label"]))}


def gain(d: np.ndarray, signal: np.ndarray, noise: np.ndarray, trace: np.ndarray) -> float:
    """What noise of variances `d` buys over equal ones; see the module's docstring.

    Args:
      d: [n], >= 0, of n parameters, or of n blocks of them.
      signal: squared gradient [n].
      noise: mean squared gradient of what a scalar is measured on [n].
      trace: of the Hessian's blocks, or its diagonal [n].
    """
    decrease = lambda d: (d @ signal) ** 2 / ((d @ noise) * (d @ trace))  # noqa: E731
    return float(decrease(d) / decrease(np.ones_like(d)))


def look(problem: Problem, state: hj.State, seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Figures of a state, and the diagonal of the Hessian's absolute value."""
    leaves = trees.select(state.params)
    flat, back = ravel_pytree(leaves)
    data = everything(problem)
    f = lambda x, data: problem.loss_fn(trees.merge(state.params, back(x)), data)  # noqa: E731
    slope = jax.jit(jax.grad(f))
    g = np.asarray(slope(flat, data), np.float64)
    # Of some examples, since it takes a product with every unit vector.
    some = np.random.default_rng(0).permutation(len(data["label"]))[:SOME]
    few = {k: v[some] for k, v in data.items()}
    along = jax.jit(lambda v: jax.jvp(lambda x: slope(x, few), (flat,), (v,))[1])
    values, vectors = np.linalg.eigh(lanczos.dense(along, flat.size))
    diagonal = (vectors**2 @ np.abs(values)).clip(1e-12)
    batches, alone = [], []
    for round in range(20):
        names = problem.clients.sample(8, 10_000 + round, seed)
        own = problem.clients.batches(names, 10_000 + round, 16, 1, seed)
        # As the jobs weigh them: the mean over clients of their mean losses.
        each = [{k: jnp.asarray(v[c, 0]) for k, v in own.items()} for c in range(len(names))]
        clients = np.stack([np.asarray(slope(flat, one), np.float64) for one in each])
        batches.append(clients.mean(0))
        alone.append((clients**2).sum(1).mean())
    batch = np.stack(batches)
    h = np.asarray(ravel_pytree({n: state.rule.curvature[n] for n in leaves})[0], np.float64)
    sizes = np.concatenate([np.full(x.size, i) for i, x in enumerate(leaves.values())])
    per_block = np.array([
        (g[sizes == i] ** 2).sum() / diagonal[sizes == i].sum() for i in range(len(leaves))
    ])  # fmt: skip
    spread = float(np.std(np.log(h)))
    seen = (g**2, (batch**2).mean(0), diagonal)
    figures = dict(
        round=int(state.round),
        loss=float(f(flat, data)),
        gradient=float((g**2).sum()),
        batch_gradient=float((batch**2).sum(1).mean()),
        trace=float(np.abs(values).sum()),
        kappa=float(np.abs(values).sum() / np.abs(values).max()),
        zeta=float((diagonal / h).sum()),
        h_mean=float(h.mean()),
        h_spread=spread,
        correlation=float(np.corrcoef(np.log(h), np.log(diagonal))[0, 1]) if spread else 0.0,
        gain_h=gain(1 / h, *seen),
        gain_curvature=gain(1 / (diagonal + diagonal.mean()), *seen),
        gain_blocks=gain(per_block[sizes], *seen),
        gain_own=float(8 * (batch**2).sum(1).mean() / np.mean(alone)),
    )
    return figures, np.stack([h, diagonal])


TITLES = {
    "round": "round", "loss": "loss", "gradient": "g squared", "batch_gradient": "of a batch",
    "client_gradient": "of a client's", "trace": "trace", "trace_error": "its error",
    "largest": "largest", "kappa": "kappa", "zeta": "zeta", "h_mean": "mean H",
    "h_spread": "spread of log H", "correlation": "correlation of logs", "gain_h": "gain of H",
    "gain_curvature": "gain of the true diagonal", "gain_blocks": "gain of block scales",
    "gain_own": "gain of per-client directions",
}  # fmt: skip
"""Of figures, of which `experiments.blocks` has others."""


def show_figures(rows: list[dict[str, Any]]) -> None:
    """Print a table of figures, a line a look."""
    names = [name for name in TITLES if name in rows[0]]
    results.show([TITLES[n] for n in names], [[f"{row[n]:.3g}" for n in names] for row in rows])


def measure(options: Curvature) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Train and look; return the figures, and H and curvature [2, n] at the end."""
    problem = digits()
    alg = hj.federated_hiso(
        problem.loss_fn, options.learning_rate, decay=options.decay, num_perturbations=10,
        distribution="rademacher",
    )  # fmt: skip
    start = alg.init(problem.params, jax.random.key(options.seed))
    rows, last = [], np.ones((2, 1))
    if 0 in options.rounds:
        figures, last = look(problem, start, options.seed)
        rows.append(figures)
    for step in federation.run(
        alg, jax.tree.map(jnp.copy, start), problem.clients, rounds=max(options.rounds),
        clients_per_round=8, batch_size=16, seed=options.seed,
    ):  # fmt: skip
        if step.round in options.rounds:
            figures, last = look(problem, step.state, options.seed)
            rows.append(figures)
    return rows, last


def draw(pairs: np.ndarray, figures: dict[str, Any], path: Path) -> None:
    """H's distribution, and H against curvature, element by element."""
    picture = report.blank(9, 3.4)
    axes = picture.subplots(1, 2)
    axes[0].hist(np.log10(pairs[0]), bins=60)
    axes[0].set(xlabel="log10 of H", ylabel="parameters")
    axes[1].loglog(pairs[1], pairs[0], ".", markersize=2, alpha=0.4)
    axes[1].set(xlabel="curvature (diagonal of |Hessian|)", ylabel="learned H",
                title=f"correlation of logs {figures['correlation']:.2f}")  # fmt: skip
    picture.suptitle(f"digits, HiSo, round {figures['round']}")
    picture.savefig(path, dpi=120)


def main(options: Curvature) -> None:
    """Measure, print the table, as Markdown too, write and draw."""
    rows, pairs = measure(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(options.out, rows)
    show_figures(rows)
    if options.picture:
        draw(pairs, rows[-1], options.picture)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Curvature))
