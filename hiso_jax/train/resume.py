"""A run's ledger begun, or brought to where it had come; and what its rounds have moved."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import baselines, server
from hiso_jax.ledger import digests, snapshots
from hiso_jax.models.adapters import STREAM
from hiso_jax.tasks.problem import Problem
from hiso_jax.train import folders, promised, selecting
from hiso_jax.train.settings import Options

MADE_OF = {
    "data": "the clients' data are", "held": "the data of dev or test are",
    "classes": "the labels or their words are", "base": "the base model is",
}  # fmt: skip
"""What a run is made of, as a message says it."""


def made_of(problem: Problem) -> dict[str, str]:
    """Digests of all that a run is made of, by which it is known again."""
    leaves = digests.by_leaf(problem.params)
    held = hashlib.sha256()
    for part in (problem.dev, problem.test):
        _add(held, part)
    return {
        "data": data_digest(problem),
        "held": held.hexdigest()[:16],
        "classes": hashlib.sha256(repr(problem.classes).encode()).hexdigest()[:16],
        "base": digests.text(digests.total(leaves.values())),
    }


def open_run(
    options: Options, problem: Problem, alg: hj.Algorithm | baselines.Baseline, bar: Any
) -> tuple[hj.Ledger | baselines.Unrecorded, hj.State, list[dict[str, Any]]]:
    """Begin the ledger of a run, or bring one that was stopped to where it had come."""
    folder = options.out
    path = folder / "ledger.sqlite"
    state = alg.init(jax.tree.map(jnp.copy, problem.params), root_key(options))
    if isinstance(alg, baselines.Baseline):
        state = baselines.restore(folder / "snapshots", alg, state)
        done = range(int(state.round))
        return (
            baselines.Unrecorded([_answered(options, problem, round) for round in done]),
            state,
            folders.rows(folder, len(done)),
        )
    about = {"task": problem.name, "data": data_digest(problem)}
    about |= {} if problem.adapter is None else {"train": problem.adapter}
    about |= selecting.recipe(problem)
    if not path.exists():
        terms = terms_of(options, problem)
        config = None if terms is None else terms.config
        return hj.Ledger.create(path, alg, state, about, config), state, []
    ledger = hj.Ledger.open(path, alg, state)
    _check_about(ledger, about)
    state = snapshots.restore(folder / "snapshots", alg, state, ledger)
    task = bar.add_task("replaying", total=ledger.rounds, status="", completed=int(state.round))
    state = server.catch_up(
        alg, state, ledger.records(int(state.round)), lambda state: bar.advance(task)
    )
    bar.remove_task(task)
    return ledger, state, folders.rows(folder, ledger.rounds)


def _check_about(ledger: hj.Ledger, about: dict[str, Any]) -> None:
    """Refuse to go on with other data, or with adapters that begin elsewhere."""
    there = ledger.header["about"]
    if there.get("data") != about["data"]:
        raise hj.LedgerMismatch(
            f"{ledger.path}: the clients' data are not those of the run: digest "
            f"{there.get('data')} there, {about['data']} here"
        )
    before, own = there.get("train"), about.get("train")
    # Earlier versions did not write it down; of what they trained, only prefixes began elsewhere.
    if before != own and (before is not None or (own or {}).get("kind") == "prefix"):
        raise hj.LedgerMismatch(f"{ledger.path}: what is trained is {before} there, {own} here")
    if (before := there.get("select")) != (own := about.get("select")):
        raise hj.LedgerMismatch(f"{ledger.path}: examples are chosen by {before} there, {own} here")


def _answered(options: Options, problem: Problem, round: int) -> dict[str, float]:
    """Who answered in a round of a run without a ledger."""
    names = _asked(options, problem, round)
    weights = federation.participation(len(names), round, options.seed, options.dropout)
    return {name: float(w) for name, w in zip(names, weights, strict=True) if w > 0}


def terms_of(options: Options, problem: Problem) -> hj.privacy.Terms | None:
    """What a run of these options promises of privacy."""
    draws = (_asked(options, problem, round) for round in range(options.rounds))
    return promised.terms(options, draws)


def _asked(options: Options, problem: Problem, round: int) -> list[str]:
    return problem.clients.sample(options.clients_per_round, round, options.seed, options.sampling)


def root_key(options: Options) -> jax.Array:
    """The key of a run, whatever kind JAX makes by default."""
    return jax.random.key(options.seed, impl="threefry2x32")


def data_digest(problem: Problem) -> str:
    """Digest of all clients' names and examples."""
    total = hashlib.sha256()
    for name in problem.clients.names:
        total.update(name.encode())
        _add(total, problem.clients[name])
    return total.hexdigest()[:16]


def _add(total: Any, columns: federation.Arrays) -> None:
    for column, values in sorted(columns.items()):
        if column == STREAM:  # computed of the others, with bits of its machine
            continue
        total.update(column.encode() + np.ascontiguousarray(values).tobytes())


def account(
    options: Options,
    problem: Problem,
    alg: Any,
    ledger: hj.Ledger | baselines.Unrecorded,
    size: int,
) -> federation.Traffic:
    """Account for the rounds that are done, of a method with `size` trained parameters."""
    if isinstance(ledger, hj.Ledger):
        traffic = federation.Traffic(ledger.shape, True, alg.spec.directions.clients or 1)
    else:
        traffic = baselines.Traffic(size)
    for round, reported in enumerate(ledger.records().reported):
        traffic.ask(_asked(options, problem, round), round, reported)
    return traffic
