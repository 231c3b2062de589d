"""Accuracy against epsilon, with noise on the sum or on every client's scalars.

On the handwritten digits over many small clients. Who takes part is known, so a client answers for
the rounds that it is drawn in; epsilon is that of the client that is drawn most. Noise of
`privacy.distributed` with nobody missing has the law of `privacy.central`'s, which stands for both.
"""

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import hiso_jax as hj
from hiso_jax import federation, privacy
from hiso_jax._engine import checks
from hiso_jax.federation import private
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import report, results
from hiso_jax.train import rows as files
from hiso_jax.train.digits import digits


@dataclasses.dataclass(frozen=True)
class Private:
    """Accuracy on the digits at several epsilons."""

    clients: int = 400
    """Clients in all (M)."""
    clients_per_round: int = 40
    """Clients of a round (C)."""
    rounds: int = 300
    """Of a run."""
    clip: float = 2.0
    """Largest norm of a client's scalars of a round."""
    epsilons: tuple[float, ...] = (2.0, 8.0)
    """Budgets; runs that are clipped, without noise, come with them."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    learning_rates: tuple[float, ...] = (0.04, 0.16)
    """Peak rates, of which the best in the mean over the seeds is shown."""
    seeds: int = 3
    """Seeds 0 to this number less one."""
    out: Path = Path("runs/private.jsonl")
    """One row a run; runs in it are not repeated."""


@functools.lru_cache(1)
def _problem(clients: int) -> Problem:
    return digits(clients)


def own_rounds(clients: federation.Clients, rounds: int, count: int, seed: int) -> int:
    """Rounds of the client that is drawn most, which the public seed tells beforehand."""
    drawn = Counter(name for r in range(rounds) for name in clients.sample(count, r, seed))
    return max(drawn.values())


def terms(options: Private, kind: str, epsilon: float, most: int) -> privacy.Terms:
    """Mechanism and budget with which a client may take part so often."""
    noise = privacy.calibrate(
        epsilon, options.delta, rounds=options.rounds, clients=options.clients,
        asked=options.clients_per_round, own_rounds=most,
    )  # fmt: skip
    count = options.clients_per_round
    if kind == "central":
        mechanism = privacy.central(options.clip, noise, clients=count)
    else:  # any data for any other: twice the sensitivity
        mechanism = privacy.local(options.clip, 2 * noise, clients=count)
    return privacy.Terms.of(mechanism, epsilon, options.delta)


class Clipped(private.Simulated):
    """Rounds of clipped scalars without noise: what the noise is compared with."""

    def __init__(self, clip: float):
        super().__init__(privacy.Terms(), bytes(32), "experiment")
        self._clip = clip

    def __call__(
        self, round: int, names: list[str], scalars: np.ndarray, weights: np.ndarray
    ) -> private.Summed:
        """The record of a round."""
        clipped = privacy.privatize(scalars, jax.random.key(0), clip=self._clip, noise_multiplier=0)
        return super().__call__(round, names, np.asarray(clipped), weights)


def accuracy(options: Private, point: dict[str, Any]) -> float:
    """Accuracy on the test split after a run of DeComFL on the digits."""
    problem, seed, count = _problem(options.clients), point["seed"], options.clients_per_round
    alg = hj.decomfl(
        problem.loss_fn,
        optax.linear_schedule(point["learning_rate"], 0.0, options.rounds),
        num_perturbations=10,
        distribution="rademacher",
    )
    summed = Clipped(options.clip)
    if point["kind"] != "none":
        most = own_rounds(problem.clients, options.rounds, count, seed)
        promised = terms(options, point["kind"], point["epsilon"], most)
        # A secret that can be drawn again: this is a measurement, nobody's data.
        secret = np.random.default_rng(seed).bytes(32)
        summed = private.Simulated(promised, secret, "experiment")
    state = alg.init(jax.tree.map(jnp.copy, problem.params), jax.random.key(seed))
    for step in federation.run(
        alg, state, problem.clients, rounds=options.rounds, clients_per_round=count,
        batch_size=16, seed=seed, summed=summed,
    ):  # fmt: skip
        state = step.state
    if summed.accountant.epsilon() > point["epsilon"]:
        raise AssertionError(f"epsilon: {summed.accountant.epsilon()} of {point['epsilon']}")
    sums = federation.evaluate(jax.jit(problem.score), state.params, problem.test, 256)
    return problem.metric_value(sums)[1]


def run(options: Private) -> list[dict[str, Any]]:
    """Run what is missing; return all rows of the table."""
    for name in ("clients", "clients_per_round", "rounds", "seeds"):
        checks.count(f"--{name.replace('_', '-')}", getattr(options, name))
    shared = dict(clients=options.clients, clients_per_round=options.clients_per_round,
                  rounds=options.rounds, clip=options.clip, delta=options.delta)  # fmt: skip
    kinds = [("none", 0.0)] + [(k, e) for e in options.epsilons for k in ("central", "local")]
    wanted = [
        dict(kind=kind, epsilon=epsilon, learning_rate=rate, seed=seed) | shared
        for seed in range(options.seeds)
        for kind, epsilon in kinds
        for rate in options.learning_rates
    ]
    rows = files.read(options.out)
    with files.append(options.out) as add:
        for point in track(files.missing(wanted, rows), "runs"):
            rows.append(point | {"accuracy": accuracy(options, point)})
            add(rows[-1])
    return files.of(wanted, rows)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The lines of the table, header first: each at its best learning rate."""
    lines = [["noise", "epsilon", "learning rate", "test accuracy"]]
    for kind, epsilon in dict.fromkeys((r["kind"], r["epsilon"]) for r in rows):
        by_rate: dict[float, list[float]] = {}
        for row in rows:
            if (row["kind"], row["epsilon"]) == (kind, epsilon):
                by_rate.setdefault(row["learning_rate"], []).append(row["accuracy"])
        rate = max(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
        shown = results.spread(np.array(by_rate[rate]), "{:.1%}".format)
        lines.append([kind, f"{epsilon:g}" if epsilon else "none", f"{rate:g}", shown])
    return lines


def main(options: Private) -> None:
    """Run, and print the table, as Markdown too."""
    header, *lines = table(run(options))
    results.show(header, lines)


if __name__ == "__main__":
    import tyro

    with report.door():
        main(tyro.cli(Private))
