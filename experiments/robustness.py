"""Clients that lie, and clients that keep their data private: what it costs in accuracy.

Attackers change what they send, nothing else; the aggregator has to bear it. Private clients
clip their scalars and add noise. Both on the handwritten digits, where a run takes seconds.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import hiso_jax as hj
from hiso_jax import aggregators, federation, privacy
from hiso_jax._engine import checks
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import curves, report, results
from hiso_jax.train import rows as files
from hiso_jax.train.digits import digits

Tamper = Callable[[jax.Array, jax.Array], jax.Array]
"""(scalars [C, K, P], key) -> what is sent."""


def attack(kind: str, share: float) -> Tamper:
    """The first ``share`` of the clients sampled, who are others every round, lie.

    Args:
      kind: ``"gaussian"``: noise of ten times the honest size; ``"sign"``: the opposite;
        ``"scaled"``: ten times too much; ``"colluding"``: all send the opposite of the honest
        mean, three times, so that they agree with each other.
      share: of the clients, in [0, 1).
    """

    def tamper(scalars: jax.Array, key: jax.Array) -> jax.Array:
        count = round(share * len(scalars))
        honest, liars = scalars[count:], scalars[:count]
        size = jnp.sqrt((honest**2).mean())
        sent = {
            "gaussian": 10 * size * jax.random.normal(key, liars.shape),
            "sign": -liars,
            "scaled": 10 * liars,
            "colluding": jnp.broadcast_to(-3 * honest.mean(0), liars.shape),
        }[kind]
        return jnp.concatenate([sent, honest])

    return tamper


def tampered(algorithm: hj.Algorithm, tamper: Tamper, key: jax.Array) -> hj.Algorithm:
    """The algorithm in a world where `tamper` stands between the clients and the server."""

    def round(state: hj.State, batches: Any, weights: Any = None) -> tuple[hj.State, hj.Metrics]:
        scalars = algorithm.probe(state, batches)
        scalars = tamper(scalars, jax.random.fold_in(key, state.round))
        record = algorithm.aggregate(scalars, weights)
        finite = jnp.isfinite(scalars).all((1, 2))
        nothing = jnp.zeros(())  # losses are not looked at
        rate = algorithm.learning_rate(state.round)
        metrics = hj.Metrics(nothing, scalars[..., 0], scalars, record, rate, finite)
        return algorithm.advance(state, record), metrics

    return algorithm._replace(round=round)


AGGREGATORS: dict[str, Callable[[float, int], aggregators.Aggregator]] = {
    "mean": lambda share, count: aggregators.mean(),
    "median": lambda share, count: aggregators.median(),
    "trimmed mean": lambda share, count: aggregators.trimmed_mean(min(share + 0.05, 0.45)),
    "Krum": lambda share, count: aggregators.krum(min(round(share * count), (count - 3) // 2)),
}
"""Each told the share of attackers, as the literature does."""


@functools.lru_cache(1)
def _problem() -> Problem:
    return digits()


def accuracy(
    seed: int,
    rounds: int,
    clients: int,
    learning_rate: float,
    tamper: Tamper | None,
    aggregator: aggregators.Aggregator,
) -> float:
    """Accuracy on the test split after a run of DeComFL on the digits."""
    problem = _problem()
    alg = hj.decomfl(
        problem.loss_fn,
        optax.linear_schedule(learning_rate, 0.0, rounds),
        num_perturbations=10,
        distribution="rademacher",
        aggregator=aggregator,
    )
    if tamper is not None:
        alg = tampered(alg, tamper, jax.random.key(1000 + seed))
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(seed))
    try:
        for report in federation.run(
            alg, state, problem.clients, rounds=rounds, clients_per_round=clients,
            batch_size=16, seed=seed,
        ):  # fmt: skip
            state = report.state
    except FloatingPointError:
        return 0.0
    sums = federation.evaluate(jax.jit(problem.score), state.params, problem.test, 256)
    return problem.metric_value(sums)[1]


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Accuracy under attacks, by aggregator; or under differential privacy, by noise."""

    what: Literal["attacks", "privacy"] = "attacks"
    """Which table."""
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    """Of attackers among the clients."""
    noise: tuple[float, ...] = (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    """Noise multipliers of private clients."""
    clip: float = 2.0
    """Largest norm of a private client's scalars."""
    delta: float = 1e-5
    """Of differential privacy."""
    rounds: int = 200
    """Rounds of a run."""
    clients_per_round: int = 20
    """Clients sampled a round, of 40."""
    learning_rate: float = 4e-2
    """Peak learning rate; it falls linearly to 0."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    out: Path = Path("runs/robustness.jsonl")
    """One row a run; runs in it are not repeated."""
    picture: Path | None = None
    """Where to draw accuracy against epsilon, a PNG."""


def _points(options: Robustness) -> list[dict[str, Any]]:
    if options.what == "privacy":
        return [dict(what="privacy", noise=n, clip=options.clip) for n in options.noise]
    kinds = ("gaussian", "sign", "scaled", "colluding")
    every = itertools.product(kinds, options.shares, AGGREGATORS)
    nobody = [dict(what="attacks", attack="none", share=0.0, aggregator=a) for a in AGGREGATORS]
    return nobody + [dict(what="attacks", attack=k, share=s, aggregator=a) for k, s, a in every]


def _one(options: Robustness, point: dict[str, Any], seed: int) -> float:
    count, aggregator = options.clients_per_round, aggregators.mean()
    tamper: Tamper | None = None
    if point["what"] == "privacy":
        noise = dict(clip=point["clip"], noise_multiplier=point["noise"])
        tamper = functools.partial(privacy.privatize, **noise)
    else:
        aggregator = AGGREGATORS[point["aggregator"]](point["share"], count)
        if point["share"]:
            tamper = attack(point["attack"], point["share"])
    return accuracy(seed, options.rounds, count, options.learning_rate, tamper, aggregator)


def run(options: Robustness) -> list[dict[str, Any]]:
    """Run what is missing; return all rows of the table."""
    for name in ("rounds", "clients_per_round", "seeds"):
        checks.count(f"--{name.replace('_', '-')}", getattr(options, name))
    checks.number("--learning-rate", options.learning_rate, 0, 1e38)
    for share in options.shares:
        checks.number("--shares", share, 0, 1)
    rows = files.read(options.out)
    shared = dict(rounds=options.rounds, learning_rate=options.learning_rate,
                  clients_per_round=options.clients_per_round)  # fmt: skip
    wanted = [p | shared | {"seed": s} for p in _points(options) for s in range(options.seeds)]
    with files.append(options.out) as add:
        for point in track(files.missing(wanted, rows), "runs"):
            rows.append(point | {"accuracy": _one(options, point, point["seed"])})
            add(rows[-1])
    return files.of(wanted, rows)


def table(options: Robustness, rows: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table, header first."""
    if options.what == "privacy":
        lines = [["noise multiplier", f"epsilon (delta {options.delta:g})", "test accuracy"]]
        names = dict.fromkeys((r["noise"],) for r in rows)
        of = lambda name: [r["accuracy"] for r in rows if r["noise"] == name[0]]  # noqa: E731
        return lines + [
            [f"{n[0]:g}", _epsilon(options, n[0]), _spread(of(n))] for n in sorted(names)
        ]
    lines = [["attack", "attackers", *AGGREGATORS]]
    for kind, share in dict.fromkeys((r["attack"], r["share"]) for r in rows):
        own = [r for r in rows if (r["attack"], r["share"]) == (kind, share)]
        cells = [[r["accuracy"] for r in own if r["aggregator"] == a] for a in AGGREGATORS]
        lines.append([kind, f"{share:.0%}", *map(_spread, cells)])
    return lines


def _spread(values: list[float]) -> str:
    return curves.spread(np.array(values), "{:.1%}".format)


def _taken_part(options: Robustness) -> int:
    """Rounds in which a client takes part, in the mean, rounded up."""
    return -(-options.rounds * options.clients_per_round // len(_problem().clients))


def _epsilon(options: Robustness, noise: float) -> str:
    if not noise:
        return "none"
    return f"{privacy.epsilon(noise, _taken_part(options), options.delta):.1f}"


def draw(options: Robustness, rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against epsilon."""
    picture = report.blank(5, 3.4)
    axis = picture.subplots()
    noises = sorted({r["noise"] for r in rows} - {0.0})
    x = [privacy.epsilon(n, _taken_part(options), options.delta) for n in noises]
    of = lambda n: [100 * r["accuracy"] for r in rows if r["noise"] == n]  # noqa: E731
    off = [curves.deviation(np.array(of(n))) for n in noises]
    axis.errorbar(x, [np.mean(of(n)) for n in noises], off, marker=".")
    if plain := of(0.0):
        axis.axhline(np.mean(plain), linestyle="--", color="grey", label="clipped, no noise")
        axis.legend()
    axis.set(xscale="log", xlabel=f"epsilon at delta = {options.delta:g}, local",
             ylabel="test accuracy (%)", title="digits: privacy at the client")  # fmt: skip
    axis.grid(alpha=0.3)
    picture.savefig(path, dpi=120)


def main(options: Robustness) -> None:
    """Run, print the table, as Markdown too, and draw."""
    rows = run(options)
    header, *lines = table(options, rows)
    results.show(header, lines)
    if options.picture and options.what == "privacy":
        draw(options, rows, options.picture)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Robustness))
