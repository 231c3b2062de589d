"""Rounds of sums on one machine, and what there is in the place of a sum where there is none."""

import hmac
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from hiso_jax import privacy, secure
from hiso_jax.algorithm import Spec


def side_by_side(
    spec: Spec, terms: privacy.Terms, vectors: Mapping[int, tuple[str, np.ndarray]], round: int,
    secret: bytes | None,
) -> np.ndarray:  # fmt: skip
    """The record of clients with directions of their own: each is released by itself.

    Args:
      spec: of the algorithm.
      terms: with a mechanism.
      vectors: place among the asked -> name, and what `Terms.contribute` gave.
      round: its number.
      secret: the server's.
    """
    clients = spec.directions.clients or 1
    scalars = np.zeros((clients, *spec.sent), np.float32)
    for slot, (name, vector) in vectors.items():
        shown = terms.release(vector, round=round, secret=secret, client=name)
        scalars[slot] = clients * terms.decode(shown, spec.sent)
    return np.asarray(spec.combine.aggregator(jnp.asarray(scalars), jnp.ones(clients)))


class Summed(NamedTuple):
    """What a simulated round of sums leaves."""

    record: np.ndarray  # float32 [K, P]
    reported: dict[str, float]  # weights by name
    event: dict[str, Any] | None  # what it has released


class Simulated:
    """Rounds of sums on one machine: all clients, and the server, in one object.

    Every party's secret comes from one, so that a run that goes on has the same.

    Args:
      terms: of the run.
      secret: of this run, from `hiso_jax.privacy.of_run`.
      run: what it is called, as of `run_name`.
      accountant: of the rounds before.
      degree: as of `hiso_jax.secure.Session`.
      least: as of `PrivateServer.mask`.

    Example:
      >>> import numpy as np
      >>> terms = privacy.Terms(masked=True)
      >>> simulated = Simulated(terms, bytes(range(32)), "run")
      >>> summed = simulated(0, ["ann", "bob", "cem"], np.ones((3, 1, 2)), np.ones(3))
      >>> summed.record.tolist(), summed.event
      ([[1.0, 1.0]], None)
    """

    def __init__(
        self,
        terms: privacy.Terms,
        secret: bytes,
        run: str,
        accountant: privacy.Accountant | None = None,
        degree: int | None = 32,
        least: int = 0,
    ):
        self.terms, self._secret, self._run = terms, secret, run
        self._degree, self._least = degree, least
        self.accountant = privacy.Accountant(terms.delta) if accountant is None else accountant
        self._sites: dict[str, bytes] = {}
        self._directory: dict[str, bytes] = {}

    def __call__(
        self,
        round: int,
        names: list[str],
        scalars: np.ndarray,
        weights: np.ndarray,
        own: Spec | None = None,
    ) -> Summed:
        """The record of a round, masked and with noise as the terms say.

        Args:
          round: its number.
          names: who was asked.
          scalars: [C, K, P].
          weights: [C], 0 for those who do not answer.
          own: of an algorithm whose clients have directions of their own: nothing is added up.

        Raises:
          hiso_jax.privacy.BudgetSpent: the round would exceed the budget; nothing is released.
        """
        terms, shape = self.terms, scalars.shape[1:]
        answered = np.flatnonzero(np.asarray(weights) > 0)
        there = [names[i] for i in answered]
        event = terms.mechanism and terms.mechanism.event
        if event is not None and terms.epsilon is not None:
            self.accountant.check(event, there, terms.epsilon)
        given = terms.contribute_all(
            scalars[answered],
            there,
            round,
            partial(self._own, b"noise"),
            weights[answered].tolist(),
        )
        vectors = dict(zip(there, given, strict=True))
        reported = {name: float(vector[-1]) for name, vector in vectors.items()}
        if own is not None and vectors and event is not None:
            self.accountant.spend(event, reported)
            slots = dict(zip(answered.tolist(), vectors.items(), strict=True))
            return Summed(side_by_side(own, terms, slots, round, self._secret), reported, event)
        total = self._masked(round, len(names), vectors) if terms.masked else None
        if not terms.masked and vectors:
            total = terms.grid.add(list(vectors.values()))
        if total is None:
            shape = shape if own is None else own.record
            return Summed(np.full(shape, np.nan, np.float32), {}, None)
        released = terms.release(total, round=round, secret=self._secret)
        if event is not None:
            self.accountant.spend(event, reported)
        return Summed(terms.decode(released, shape), reported, event)

    def _own(self, purpose: bytes, name: str) -> bytes:
        return hmac.digest(self._secret, purpose + b" of " + name.encode(), "sha256")

    def _masked(
        self, round: int, asked: int, vectors: Mapping[str, np.ndarray]
    ) -> np.ndarray | None:
        """The sum over those that answer, who are the roster, as real sites are; None: too few."""
        least = max(2, self.terms.least or self._least or secure.two_thirds(asked))
        if len(vectors) < least:
            return None
        for name in vectors:
            if name not in self._sites:
                self._sites[name] = self._own(b"site", name)
                self._directory[name] = secure.site_public(self._sites[name])
        length = len(next(iter(vectors.values())))
        session = secure.Session(self._run, round, tuple(vectors), length, 0, self._degree, least)
        total, there = secure.run(session, vectors, self._sites, self._directory)
        self.terms.check_sum(total, len(there))
        return total
