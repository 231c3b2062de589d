"""What is sent: payload bytes by client, up and down."""

from collections.abc import Container, Sequence

import numpy as np

from hiso_jax._engine import renamed


class Traffic:
    """Counts payload bytes: what has crossed the network, nothing else has.

    A client's first message down is the root key (8 bytes). Then, whenever it is asked, it
    gets the round's number (4 bytes) and the records it missed (K x P float32 each, as
    ``ledger.records(since)``), and sends K x P float32.

    Args:
      record_shape: (K, P).
      schedule: whether the learning rate follows one: it is then sent too, 4 bytes a record.
      per_client_directions: C, where a client sends its part of a record only.
    """

    @renamed.arguments(own_directions="per_client_directions")
    def __init__(
        self, record_shape: tuple[int, int], schedule: bool = False, per_client_directions: int = 1
    ):
        whole = 4 * int(np.prod(record_shape))
        self.record_bytes = whole // per_client_directions
        self.missed_bytes = whole + 4 * schedule
        self.up: dict[str, int] = {}
        self.down: dict[str, int] = {}
        self._next: dict[str, int] = {}

    def ask(self, names: Sequence[str], round: int, reported: Container[str] | None = None) -> None:
        """Account a round: every named client catches up; all, or those `reported`, answer."""
        self.catch_up(names, round)
        for name in names:
            self.down[name] += 4
            if reported is None or name in reported:
                self.up[name] = self.up.get(name, 0) + self.record_bytes

    def catch_up(self, names: Sequence[str], round: int) -> None:
        """Account the records that bring the named clients to the start of `round`."""
        for name in names:
            missed = round - self._next.get(name, 0)
            self.down[name] = self.down.get(name, 8) + missed * self.missed_bytes
            self._next[name] = round
