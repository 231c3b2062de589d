"""What a run has gone through, as its host tells it: digests, and what clients have missed."""

from typing import Any

import numpy as np

from hiso_jax.federation.server import Server
from hiso_jax.ledger import digests
from hiso_jax.ledger.store import Records


class Past:
    """Of a server's ledger; what was looked up last is kept, for most clients ask for the same.

    Args:
      server: of the run.
      base: digest of the state before the first round, uint32 [2], where the server was given a
        later one.

    Raises:
      ValueError: `base` is missing, or the ledger has rounds without a digest, as one has that
        was made of a compact file: nobody could be told what to hold.
    """

    def __init__(self, server: Server, base: Any = None):
        base = server.base if base is None else base
        if base is None:
            raise ValueError("base: needed, the digest of the fresh state; the server was given a "
                             "later state")  # fmt: skip
        if None in server.ledger.records().digests:
            raise ValueError(f"server: {server.ledger.path} has rounds without a digest; go on "
                             "with the ledger.sqlite of the run")  # fmt: skip
        self._server, self._base = server, np.asarray(base)
        self._digest: tuple[int, np.ndarray] | None = None
        self._missed: tuple[tuple[int, int], Records] | None = None

    def digest(self, rounds: int) -> np.ndarray:
        """Of the state after so many rounds, uint32 [2]."""
        if self._digest is None or self._digest[0] != rounds:
            self._digest = rounds, digests.parse(self.text(rounds))
        return self._digest[1]

    def text(self, rounds: int) -> str:
        """The same, as the ledger has it."""
        if not rounds:
            return digests.text(self._base)
        return self._server.ledger.digest(rounds - 1) or ""

    def missed(self, held: int) -> Records:
        """The records of whoever holds the state after `held` rounds."""
        asked = held, self._server.round
        if self._missed is None or self._missed[0] != asked:
            self._missed = asked, self._server.ledger.records(held)
        return self._missed[1]
