"""Where each client of a run stands, as far as is known, and what brings it to the round."""

from collections import Counter
from typing import Any

import numpy as np

from hiso_jax.federation import wire
from hiso_jax.federation.past import Past
from hiso_jax.federation.server import Server
from hiso_jax.ledger import digests, snapshots

RESETS = 2
"""Times that a client is sent back to the base model before it is only named."""
CATCH_UPS = 3
"""Times a round that a client is sent what it missed: its process may begin again meanwhile."""


class Standing:
    """Of the clients of a server's run.

    Args:
      server: of the run.
      base: as of `Past`.

    Raises:
      ValueError: as of `Past`.
    """

    def __init__(self, server: Server, base: Any = None):
        self._server, self.past = server, Past(server, base)
        self._room = snapshots.size(server.algorithm, server.state)
        self._held: dict[str, int] = {}  # name -> round that the client is known to be at
        self._reset: dict[str, int] = {}  # name -> times that it had to begin again
        self._apart: set[str] = set()  # those that have to, at the next ask
        self._told: dict[str, int] = {}  # name -> round that it has said last, in this round
        self._catch_ups: Counter[str] = Counter()  # times, of the round

    def begin(self) -> None:
        """A round begins: what was said in the one before is over."""
        self._told, self._catch_ups = {}, Counter()

    def ask(self, name: str) -> wire.Ask:
        """What a client is asked first in a round."""
        reset = name in self._apart
        self._apart.discard(name)
        return self._message(None if reset else self._held.get(name), reset)

    def measured(self, name: str, digest: np.ndarray) -> None:
        """Take from a client's reply that it stands at the round, if it does.

        Raises:
          ValueError: its state is another one.
        """
        round = self._server.round
        if (digest != self.past.digest(round)).any():
            self._held.pop(name, None)
            raise ValueError(
                f"measured at another state: after {round} rounds its digest is "
                f"{digests.text(digest)} there and {self.past.text(round)} here"
            )
        self._held[name] = round
        self._reset.pop(name, None)

    def behind(self, name: str, message: wire.Behind) -> wire.Ask | None:
        """What a client needs that stands elsewhere; None if it says again what it was sent for.

        A network may repeat what a client has said, which it cannot help.

        Raises:
          ValueError: nothing that it is sent brings it to the round; says why.
        """
        held, rounds = message.held, self._server.round
        if held > rounds:
            self._send_back(name)
            raise ValueError(
                f"it has gone through {held} rounds, the ledger has {rounds}: it is "
                "of a run that this ledger, a copy from before, does not know"
            )
        if (message.digest != self.past.digest(held)).any():
            self._send_back(name)
            raise ValueError(
                f"the model that it begins with is not the run's: after {held} rounds its digest "
                f"is {digests.text(message.digest)} there and {self.past.text(held)} here"
            )
        if self._told.get(name) == held:
            return None
        if self._held.get(name) == held:  # it was sent all that it needs, and did not move
            raise ValueError(f"it stays at round {held}")
        if self._catch_ups[name] >= CATCH_UPS:  # each may cost a whole model
            raise ValueError(f"it has been behind {CATCH_UPS} times in this round")
        self._held[name] = self._told[name] = held
        self._catch_ups[name] += 1
        return self._message(held)

    def apart(self, name: str, message: wire.Apart) -> str:
        """Send a client back to the base model, whose state is not the run's; where it went."""
        self._send_back(name)
        return wire.where_apart(message, self._server.round, self.past.text)

    def _send_back(self, name: str) -> None:
        self._held.pop(name, None)
        if self._reset.get(name, 0) < RESETS:
            self._reset[name] = self._reset.get(name, 0) + 1
            self._apart.add(name)

    def _message(self, held: int | None, reset: bool = False) -> wire.Ask:
        """Ask a client that is at round `held`; None: it is to say where it is."""
        server, round = self._server, self._server.round
        nothing = np.zeros((0, *server.ledger.shape), np.float32)
        ask = wire.Ask(round, self.past.digest(round), round, nothing, reset=reset)
        if held is None or held == round:
            return ask
        records = self.past.missed(held)
        if records.nbytes > self._room or len(records.scalars) > wire.MOST_ROUNDS:
            return ask._replace(snapshot=snapshots.pack(server.algorithm, server.state))
        return ask._replace(first=held, records=records.scalars, rates=records.learning_rates)
