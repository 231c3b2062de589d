"""A client that is alone on its machine: it holds the state, catches up, measures on its own data.

It knows nothing of networks: `Site.answer` makes the bytes that go up of the bytes that came
down. What it keeps on disk are snapshots, so that it need not begin at the base model when its
process does; none is trusted before the server has been told its digest.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from hiso_jax._engine import checks, exact
from hiso_jax.federation import wire
from hiso_jax.ledger import digests, snapshots
from hiso_jax.ledger import header as headers
from hiso_jax.privacy import Terms
from hiso_jax.protocol import Algorithm, State
from hiso_jax.secure import SecureError

if TYPE_CHECKING:
    from hiso_jax.federation.masked import Masks  # needs the extra `secure`

log = logging.getLogger(__name__)


class Site:
    """One client of a run.

    Args:
      algorithm: the run's; its loss sees this client's data only.
      begin: gives the fresh state of ``algorithm.init``; called again when the server finds that
        what is held here is not the run's.
      batches: ``round -> leaves [1, K, B, ...]``, this client's examples of that round.
      folder: for snapshots; each run has a folder of its own in it. None: nothing is kept.
      snapshot_every: rounds between snapshots.
      on_end: called once with the state after the last round.
      promised: of privacy; where replies are masked, this client's side of it.

    Raises:
      ValueError: the algorithm has no name for a part of it, so that no two parties could know
        that they have the same; `snapshot_every` is no count; or masks are promised, and none
        are given.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> from hiso_jax.federation import Host, Server, Site
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> begin = lambda: alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> sites = {n: Site(alg, begin, lambda round: jnp.ones((1, 1, 3))) for n in ("ann", "bob")}
      >>> ledger = hj.Ledger.create(":memory:", alg, begin())
      >>> def send(name, message):  # a network would be here
      ...     answer = sites[name].answer(message)
      ...     host.receive(name, answer)
      >>> host = Host(Server(alg, begin(), ledger), send)
      >>> for _ in range(3):
      ...     closed = host.conduct(["ann", "bob"], deadline=60)
      >>> closed.round, closed.reported, closed.faults
      (2, {'ann': 1.0, 'bob': 1.0}, {})
      >>> host.end(["ann", "bob"], deadline=60)  # both hold the model that the ledger proves
      ['ann', 'bob']
    """

    def __init__(
        self,
        algorithm: Algorithm,
        begin: Callable[[], State],
        batches: Callable[[int], Any],
        folder: str | os.PathLike[str] | None = None,
        snapshot_every: int = 50,
        on_end: Callable[[State], Any] = lambda state: None,
        promised: "Terms | Masks | None" = None,
    ):
        self.algorithm, self._begin, self._batches = algorithm, begin, batches
        self._every = checks.count("snapshot_every", snapshot_every)
        self._on_end, self._ended = on_end, False
        state = begin()
        terms = promised if isinstance(promised, Terms | None) else promised.terms
        self._masks = None if isinstance(promised, Terms | None) else promised
        if terms is not None and terms.masked and self._masks is None:
            raise ValueError(
                "promised: replies are masked; expected hiso_jax.federation.masked.Masks"
            )
        self.header = headers.describe(algorithm, state, None, terms and terms.config)
        self.run = wire.identity(self.header)
        if self._masks is not None:
            self._masks.run = self.run.hex()
        self.folder = None if folder is None else Path(folder) / self.run.hex()
        options = exact.compiler_options()
        self._advance = jax.jit(algorithm.advance, compiler_options=options)
        self._probe = jax.jit(algorithm.probe, compiler_options=options)
        self._measured: tuple[tuple[int, int], np.ndarray] | None = None
        if self.folder is not None:
            state = snapshots.latest(self.folder, algorithm, state)
        self._hold(state)

    def _hold(self, state: State) -> None:
        """Stand at a state that no records led to."""
        self.state, self._first = state, int(state.round)
        self._digests = [np.asarray(digests.digest(state))]
        self._measured, self._apart = None, False

    @property
    def round(self) -> int:
        """Rounds that the state has gone through."""
        return self._first + len(self._digests) - 1

    @property
    def digest(self) -> np.ndarray:
        """Of the state, uint32 [2]."""
        return self._digests[-1]

    def answer(self, message: bytes) -> bytes:
        """What goes up for a message that came down.

        What fails here (data that cannot be read, a full disk) is logged here; up goes the kind
        of error only, since its text may hold data, and whose message of a masked round is refused.
        A message of another run is answered by what this client is.

        Raises:
          WireError: the message is none; nothing has been done.
        """
        if (run := wire.run_of(message)) is not None and run != self.run:
            return self._pack(wire.Other(wire.round_of(message), self.header))
        spec = self.algorithm.spec
        ask = wire.parse(message, self.run, spec.sent, spec.record)
        masks = self._masks
        try:
            if masks is not None and isinstance(ask, wire.Step):
                return self._pack(masks.answer(ask))
            if isinstance(ask, wire.Ask):
                return self._pack(self._answer(ask))
        except Exception as error:
            log.exception("this client cannot answer %s", type(ask).__name__)
            blames = error.client if isinstance(error, SecureError) else ""
            return self._pack(wire.Failed(ask.round, type(error).__name__, blames))
        raise wire.WireError(f"message: expected to be asked, got {type(ask).__name__}")

    def _pack(self, message: wire.Message) -> bytes:
        return wire.pack(message, self.run)

    def _answer(self, ask: wire.Ask) -> wire.Message:
        if ask.reset and self.round:
            log.warning("round %d: back to the base model, as the server asks", ask.round)
            self._hold(self._begin())
        if ask.snapshot is not None:
            self._hold(snapshots.unpack(ask.snapshot, ask.round, self.algorithm, self.state))
        elif self._apart:  # and no reset: the server has seen that it does not help
            return wire.Apart(ask.round, self._first, np.stack(self._digests))
        elif not ask.first <= self.round <= ask.round <= ask.first + len(ask.records):
            return self._where(ask)
        else:
            self._catch_up(ask)
        if (self.digest != ask.digest).any():
            log.error("round %d: the digest is %s here and %s at the server", ask.round,
                      digests.text(self.digest), digests.text(ask.digest))  # fmt: skip
            self._apart = True
            return wire.Apart(ask.round, self._first, np.stack(self._digests))
        if ask.last:
            self._end()
            return wire.Reply(ask.round, self.digest, None)
        scalars = self._measure(ask)
        if self._masks is None:
            return wire.Reply(ask.round, self.digest, scalars)
        # Whatever the server asks for: where the run is masked, nothing else leaves.
        self._masks.keep(ask.round, scalars)
        return wire.Reply(ask.round, self.digest, None)

    def _where(self, ask: wire.Ask) -> wire.Message:
        """What is said where the records do not fit: where this client stands."""
        if self.round == ask.round and (self.digest != ask.digest).any():
            self._apart = True
            return wire.Apart(ask.round, self._first, np.stack(self._digests))
        return wire.Behind(ask.round, self.round, self.digest)

    def _catch_up(self, ask: wire.Ask) -> None:
        for i in range(self.round - ask.first, ask.round - ask.first):
            rate = None if ask.rates is None else ask.rates[i]
            self.state = self._advance(self.state, ask.records[i], rate)
            self._digests.append(np.asarray(digests.digest(self.state)))
            if self.round % self._every == 0 and self.round < ask.round:
                self._save()  # on a long way, so that it need not be gone again
        # Of this round only if it is the run's: the server's digest says so.
        if self.round % self._every == 0 and (self.digest == ask.digest).all():
            self._save()

    def _save(self) -> None:
        if self.folder is None or not self.round:
            return
        try:
            snapshots.save(self.folder, self.algorithm, self.state)
        except OSError:  # a convenience: without it the next process begins further back
            log.exception("round %d: no snapshot", self.round)

    def _measure(self, ask: wire.Ask) -> np.ndarray:
        """Scalars [K, P]; those of the last time if the same is asked again."""
        slot = ask.slot if self.algorithm.spec.directions.clients is not None else 0
        asked = (ask.round, slot)
        if self._measured is None or self._measured[0] != asked:
            scalars = self._probe(self.state, self._batches(ask.round), slot)
            self._measured = asked, np.asarray(scalars)[0]
        return self._measured[1]

    def _end(self) -> None:
        if not self._ended:
            self._save()
            self._on_end(self.state)
            self._ended = True
