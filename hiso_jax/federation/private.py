"""Rounds of sums: of integers, masked or with noise, as the ledger's header promises.

`PrivateServer` is a `Server` for real clients, `Simulated` does the same on one machine. What is
promised (`hiso_jax.privacy.Terms`) is in the header, what was released in the rows.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hiso_jax import privacy, secure
from hiso_jax._engine import checks
from hiso_jax.federation.server import Server
from hiso_jax.federation.simulated import Simulated, Summed, side_by_side
from hiso_jax.ledger import header as headers
from hiso_jax.ledger.store import Ledger
from hiso_jax.protocol import Algorithm, State

__all__ = ["PrivateServer", "Simulated", "Summed", "accountant_of", "run_name", "terms_of"]

_NOBODY = ""
"""Who is asked in a round that the secret draw has left empty: it must look like any other."""


def run_name(ledger: Ledger) -> str:
    """What a run is called in masked rounds and journals: a digest of the ledger's header."""
    return hashlib.sha256(headers.canonical(ledger.header).encode()).hexdigest()


def terms_of(ledger: Ledger) -> privacy.Terms:
    """What a ledger's header promises.

    Raises:
      ValueError: it promises nothing.
    """
    if "privacy" not in ledger.header:
        raise ValueError(f"ledger: {ledger.path} promises nothing: create it with "
                         "privacy=hiso_jax.privacy.Terms(...).config")  # fmt: skip
    return privacy.Terms.from_config(ledger.header["privacy"])


def accountant_of(ledger: Ledger, delta: float | None = None) -> privacy.Accountant:
    """What a ledger's rows have given away, for whoever has the ledger."""
    delta = terms_of(ledger).delta if delta is None else delta
    return privacy.Accountant.of(ledger.events(), ledger.records().reported, delta)


class PrivateServer(Server):
    """A server that adds up integers, masked or with noise, and keeps to a budget.

    Args:
      algorithm: the run's; its aggregator is the mean.
      state: as of `Server`.
      ledger: whose header has `privacy`: the config of `hiso_jax.privacy.Terms`.
      secret: from `hiso_jax.privacy.secret`, which the noise of a central mechanism and its draw
        come from; those of another ledger are others, unless its header is the same.
      directory: Ed25519 public keys [32] of the clients' sites by name, for masked rounds; who
        is added later counts from then on.

    Raises:
      ValueError: the terms need a secret or a directory that is not given, or the algorithm
        does not go with them.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> terms = hj.privacy.Terms.of(hj.privacy.central(4.0, 6.0, clients=2), epsilon=2.0)
      >>> ledger = hj.Ledger.create(":memory:", alg, state, privacy=terms.config)
      >>> server = PrivateServer(alg, state, ledger, secret=bytes(range(32)))
      >>> number = server.open(["ann", "bob"])
      >>> all(server.reply(name, number, jnp.ones((1, 5))) for name in ("ann", "bob"))
      True
      >>> server.close().shape, ledger.events()
      ((1, 5), [{'noise': 6.0, 'participation': 'known'}])
      >>> 0.5 < accountant_of(ledger).epsilon() < 1
      True
    """

    def __init__(
        self,
        algorithm: Algorithm,
        state: State,
        ledger: Ledger,
        *,
        secret: bytes | None = None,
        directory: Mapping[str, bytes] | None = None,
    ):
        self.terms = terms_of(ledger)
        self.terms.check(algorithm.spec)
        if self.terms.kind == "central" and secret is None:
            raise ValueError("secret: a central mechanism needs the server's, got None")
        if self.terms.masked and directory is None:
            raise ValueError("directory: masked rounds need the sites' public keys, got None")
        super().__init__(algorithm, state, ledger)
        self._secret = None if secret is None else privacy.of_run(secret, run_name(ledger))
        self.directory = directory
        self.accountant = accountant_of(ledger)
        self.masked: secure.Server | None = None
        self._released: tuple[dict[str, Any], dict[str, float]] | None = None
        self._seen: list[str] = []  # of whom something may be known, even if the round is void

    def open(self, names: Iterable[Any]) -> int:
        """Ask clients for a round; return its number. See `Server.open`.

        Raises:
          hiso_jax.privacy.BudgetSpent: the round would exceed the budget; none is open.
          ValueError: the terms promise a secret draw: use `open_drawn`.
        """
        mechanism = self.terms.mechanism
        if mechanism is not None and mechanism.rate is not None:
            raise ValueError("names: the ledger promises a secret draw; open rounds by open_drawn")
        asked = checks.clients("names", names)
        self._check_budget(asked)
        number = super().open(asked)
        self.masked = None
        # A process before may have been killed between a sum and its record.
        self._seen = self.ledger.opened() if self.terms.kind == "distributed" else []
        return number

    def open_drawn(self, names: Iterable[Any]) -> list[str]:
        """Draw who takes part, secretly, from the names of all clients, and open the round.

        The same clients are drawn for the same round again. There may be none.

        Raises:
          ValueError: the terms promise no secret draw.
          hiso_jax.privacy.BudgetSpent: the round would exceed the budget; none is open.
        """
        mechanism = self.terms.mechanism
        if mechanism is None or mechanism.rate is None or self._secret is None:
            raise ValueError("names: the ledger promises no secret draw; open rounds by open")
        drawn = privacy.draw(names, mechanism.rate, round=self.round, secret=self._secret)
        self._check_budget(())
        super().open(drawn or ["nobody"])
        self._asked = dict.fromkeys(drawn or [_NOBODY])
        return drawn

    def mask(
        self,
        threshold: int = 0,
        degree: int | None = None,
        names: Iterable[str] | None = None,
        least: int = 0,
        minimum: int = 1,
        run: str | None = None,
    ) -> secure.Server:
        """The masked session of the round that is open; `close` takes its sum.

        Args:
          threshold: as of `hiso_jax.secure.Session`.
          degree: the same.
          names: of those among the asked that take part in the session; all by default.
          least: fewest clients that a sum is revealed of, if the terms do not say it; by default
            two thirds of the asked, whoever takes part.
          minimum: as `close` will be given; nothing is revealed of fewer.
          run: what the clients call the run; by default `run_name`.

        Raises:
          RuntimeError: no round is open, or it has a session.
          ValueError: replies of this run are not masked; or there are too few names for a sum.
        """
        if not self._asked or self.masked is not None:
            raise RuntimeError("mask: expected a round that is open and has no session")
        if not self.terms.masked or self.directory is None:
            raise ValueError("mask: the ledger says that replies of this run are not masked")
        steps, width = self.algorithm.spec.sent
        roster = tuple(self._asked if names is None else names)
        least = max(self.terms.least or least or secure.two_thirds(len(self._asked)), minimum)
        run = run_name(self.ledger) if run is None else run
        session = secure.Session(run, self.round, roster, steps * width + 1, threshold, degree,
                                 least)  # fmt: skip
        self.masked = secure.Server(session, self.directory, self._note)
        return self.masked

    def _note(self, names: list[str]) -> None:
        """Write down whose noise a sum may use up from now on, whatever becomes of the round."""
        if self.terms.kind == "distributed":
            self._seen = list(self.ledger.open_round(names))

    def reply(self, name: Any, round: int, scalars: Any, weight: float = 1.0) -> bool:
        """Take a client's reply; return whether it counts.

        Args:
          name: of the client.
          round: that it replies to.
          scalars: [K, P]; of a local mechanism, and where a client encodes by itself, what
            `hiso_jax.privacy.Terms.contribute` gave, int64 [K P + 1].
          weight: a whole number; it is in what was encoded already.

        Raises:
          ValueError: the client was not asked, its reply should be masked or have noise, or it is
            out of range; names the client.
        """
        name = checks.client("name", name)
        if not self._waits_for(name, round):
            return False
        if self.terms.masked:
            raise ValueError(f"scalars: client {name!r}: replies of this run are masked; its "
                             "messages go to the session that `mask` gives")  # fmt: skip
        (steps, width), given = self.algorithm.spec.sent, np.asarray(scalars)
        if given.dtype == np.int64 and given.shape == (steps * width + 1,):
            if self.terms.kind == "central":
                raise ValueError(f"scalars: client {name!r}: expected [K, P], which the server "
                                 "clips; got what is encoded")  # fmt: skip
            try:
                self.terms.check_sum(given, 1)
            except ValueError as error:
                raise ValueError(f"scalars: client {name!r}: {error}") from None
            vector = given
        elif self.terms.kind == "local":
            raise ValueError(f"scalars: client {name!r}: the ledger promises noise of its own; "
                             "expected what Terms.contribute gave, got "
                             f"{given.dtype} {list(given.shape)}")  # fmt: skip
        elif given.shape != (steps, width):
            raise ValueError(f"scalars: client {name!r}: expected shape {(steps, width)}, "
                             f"got {given.shape}")  # fmt: skip
        else:
            vector = self.terms.contribute(given, client=name, round=round, weight=weight)
        self._replies[name] = (vector, float(vector[-1]))
        return True

    def close(self, minimum: int = 1) -> np.ndarray:
        """Release the sum, advance, and commit record and event; return the record [K, P].

        Nothing is released before it is committed, and what is computed again after a crash is
        the same. A masked round of which too few are left, or whose session has not come to its
        end, is void: a record of NaN. Where clients add the noise, since the server is not
        trusted, a void round is charged to those of whom it could have seen something.

        Args:
          minimum: as of `Server.close`; more than 1 would show how many a secret draw has drawn.

        Raises:
          RuntimeError: no round is open.
          ValueError: `minimum` is none.
          hiso_jax.secure.SecureError: somebody has forged; the round stays open.
        """
        if minimum != 1 and self.terms.mechanism is not None and self.terms.mechanism.rate:
            raise ValueError(f"minimum: a round that is void for few clients shows how many the "
                             f"secret draw has drawn; expected 1, got {minimum!r}")  # fmt: skip
        record = super().close(minimum)
        if self._released is not None:
            self.accountant.spend(*self._released)
        self.masked = self._released = None
        self._seen = []
        return record

    def _check_budget(self, names: Iterable[str]) -> None:
        mechanism = self.terms.mechanism
        if mechanism is not None and self.terms.epsilon is not None:
            self.accountant.check(mechanism.event, names, self.terms.epsilon)

    def _combine(self, minimum: int) -> tuple[np.ndarray, dict[str, float], dict[str, Any] | None]:
        mechanism, shape = self.terms.mechanism, self.ledger.shape
        secret_draw = mechanism is not None and mechanism.rate is not None
        names = [name for name in self._asked if name in self._replies]
        if self.terms.kind == "local":
            self._seen = names
        if self.algorithm.spec.directions.clients is not None:
            return self._combine_own(names, minimum)
        if self.terms.masked:
            total, names = self._unmasked(minimum)
        elif len(names) >= minimum:
            total = self.terms.grid.add([self._replies[name][0] for name in names])
        else:  # an empty round shows who was drawn, unless it is like the others
            total = np.zeros(shape[0] * shape[1] + 1, np.int64) if secret_draw else None
            names = []
        if total is None:
            return self._void()
        released = self.terms.release(total, round=self.round, secret=self._secret)
        record = self.terms.decode(released, shape)
        # Of a masked sum, only the sum of the weights is known.
        even = float(total[-1]) / max(len(names), 1)
        reported = {n: self._replies[n][1] if n in self._replies else even for n in names}
        reported = {} if secret_draw else dict.fromkeys(self._seen, 1.0) | reported
        event = None if mechanism is None else mechanism.event
        self._released = None if event is None else (event, reported)
        return record, reported, event

    def _void(self) -> tuple[np.ndarray, dict[str, float], dict[str, Any] | None]:
        """What is recorded of a round without a sum."""
        seen, mechanism = dict.fromkeys(self._seen, 1.0), self.terms.mechanism
        event = mechanism.event if mechanism is not None and seen else None
        self._released = None if event is None else (event, seen)
        return np.full(self.ledger.shape, np.nan, np.float32), seen, event

    def _combine_own(
        self, names: list[str], minimum: int
    ) -> tuple[np.ndarray, dict[str, float], dict[str, Any] | None]:
        if len(names) < minimum or self.terms.mechanism is None:
            return self._void()
        slots = {name: slot for slot, name in enumerate(self._asked)}
        vectors = {slots[name]: (name, self._replies[name][0]) for name in names}
        record = side_by_side(self.algorithm.spec, self.terms, vectors, self.round, self._secret)
        reported = {name: self._replies[name][1] for name in names}
        self._released = self.terms.mechanism.event, reported
        return record, reported, self._released[0]

    def _unmasked(self, minimum: int) -> tuple[np.ndarray | None, list[str]]:
        # Closed before the session has come to its end, the round is void: nothing was revealed.
        if self.masked is None or self.masked.step not in (b"R", b""):
            return None, []
        try:
            total, names = self.masked.total()
        except secure.TooFew:
            return None, []
        if len(names) < minimum:
            return None, []
        self.terms.check_sum(total, len(names))
        return total, names
