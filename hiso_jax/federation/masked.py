"""Masked rounds between a host and its sites: who is there first, then four steps.

A round begins as any other: sites are asked, catch up and measure, but what they have measured
stays with them. Those that have answered in time are the roster of a `hiso_jax.secure.Session`,
whose steps take no computing of losses, so each has a deadline of its own. Who is gone after one is
out of the sum, and with fewer than the threshold the round is void.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np

from hiso_jax import privacy, secure
from hiso_jax._engine import checks
from hiso_jax.federation import wire
from hiso_jax.federation.host import Host
from hiso_jax.federation.private import PrivateServer
from hiso_jax.secure.session import KEYS, MASKED, REVEALED, SHARES

log = logging.getLogger(__name__)
NEIGHBORS = 32
"""Of a site, at most; see `hiso_jax.secure.Session`."""
BEGIN = b"B"
"""What the first step down is: the session. The others are what the server makes of K, S and M."""


class Masks:
    """A site's side of masked rounds, for `hiso_jax.federation.Site`.

    Args:
      terms: what the run promises.
      name: of the site.
      identity: its key and certificate.
      authority: certificate of who has provisioned the sites, PEM.
      journal: so that it gives one vector a round, also after a crash.
      secret: from `hiso_jax.privacy.secret`, which its share of each run's noise comes from; None
        if it adds none.
    """

    def __init__(
        self,
        terms: privacy.Terms,
        name: str,
        identity: secure.Identity,
        authority: bytes,
        journal: secure.Journal,
        secret: bytes | None = None,
    ):
        self.terms, self.name = terms, name
        self.run = ""  # the site's own; what the server calls it would open another journal
        self._identity, self._authority = identity, authority
        self._journal, self._secret = journal, secret
        self._kept: tuple[int, np.ndarray] | None = None
        self._client: secure.Client | None = None
        self._directory: dict[str, bytes] = {}
        self._last: tuple[wire.Step, wire.Step] | None = None

    def keep(self, round: int, scalars: np.ndarray) -> None:
        """Remember what was measured [K, P], which never leaves as it is."""
        self._kept = round, scalars

    def answer(self, step: wire.Step) -> wire.Step:
        """Take one step; the same again is answered as before.

        Raises:
          hiso_jax.secure.SecureError: what the server says is not what the protocol asks for.
        """
        if self._last is None or self._last[0] != step:
            self._last = step, wire.Step(step.round, tuple(self._take(step)))
        return self._last[1]

    def _take(self, step: wire.Step) -> list[bytes]:
        if self._kept is None or self._kept[0] != step.round or len(step.parts) < 2:
            raise secure.SecureError(f"round {step.round}: nothing was measured for it here")
        kind, body, *shown = step.parts
        if kind == BEGIN:
            self._directory = {}
            session = self._session(step.round, json.loads(body))
            self._client = secure.Client(session, self.name, self._identity.key, self._directory,
                                         self._journal)  # fmt: skip
            return [self._client.advertise(), self._identity.credential]
        client = self._client
        if client is None or client.session.round != step.round:
            raise secure.SecureError(f"round {step.round}: no session has begun here")
        if kind == KEYS:
            for name, credential in zip(shown[::2], shown[1::2], strict=True):
                text = name.decode()
                self._directory[text] = secure.holder(credential, text, self._authority)
            return [client.share(body)]
        if kind == SHARES:
            # Of this run only: what two runs measure alike must not have one noise.
            own = None if self._secret is None else privacy.of_run(self._secret, self.run)
            vector = self.terms.contribute(
                self._kept[1], client=self.name, round=step.round, secret=own
            )
            return [client.mask(body, vector)]
        return [client.unmask(body)]

    def _session(self, round: int, told: Mapping[str, Any]) -> secure.Session:
        assert self._kept is not None
        if told["run"] != self.run:
            raise secure.SecureError(f"run: expected {self.run!r}, got {told['run']!r}")
        session = secure.Session(
            self.run, round, tuple(told["names"]), self._kept[1].size + 1,
            told["threshold"], told["degree"], told["least"],
        )  # fmt: skip
        if session.least < self.terms.least:
            raise secure.SecureError(f"least: {session.least} clients would have less noise than "
                                     f"is promised, expected {self.terms.least}")  # fmt: skip
        return session


class MaskedHost(Host):
    """A host whose server sees sums only.

    Args:
      server: of a run whose terms are masked, with a directory that can be added to.
      send: as of `Host`.
      authority: certificate of who has provisioned the sites, PEM.
      base: as of `Host`.
      threshold: fewest sites that a sum is revealed of, and shares that unmask one, of all; by
        default more than two thirds, and each site has 32 neighbors at most.
      patience: seconds that each of the four steps waits for those who do not answer.

    Raises:
      ValueError: as of `Host`; or replies of the run are not masked.
    """

    server: PrivateServer
    void = ""  # why the last round has no sum, where it has none

    def __init__(
        self,
        server: PrivateServer,
        send: Callable[[str, bytes], Any],
        authority: bytes,
        base: Any = None,
        threshold: int = 0,
        patience: float = 60.0,
    ):
        if not server.terms.masked or not isinstance(server.directory, MutableMapping):
            raise ValueError("server: expected one of masked replies, with a directory that can be "
                             "added to")  # fmt: skip
        super().__init__(server, send, base=base)
        self._credentials: dict[str, bytes] = {}
        self._forged: dict[str, str] = {}  # who has, as the server itself found, and what
        self._directory, self._authority = server.directory, authority
        self._threshold = threshold
        self._patience = checks.number("patience", patience, 0, above=True)

    def _measured(self, name: str, message: wire.Reply) -> None:
        if self.server.masked is not None:
            return None  # once more; it is a step that is waited for
        if message.scalars is not None:
            raise ValueError("it sent its scalars in the open; replies are masked")
        if name in self._forged:  # one such round is enough
            raise ValueError(f"left out: {self._forged[name]}")
        self._done.add(name)
        return None

    def _gather(self, stop: Callable[[], bool], gone: Callable[[str], bool], minimum: int) -> bool:
        lost: set[str] = set()  # who is gone; nobody waits for them any more
        self.void = ""
        try:
            return self._session(lost, stop, gone, minimum)
        except ValueError as error:  # too few for a sum, or somebody has forged
            self.server.masked, self.void = None, str(error)
            why = f"round {self.server.round} is void: {error}"
            log.warning("%s", why)
            if isinstance(error, secure.SecureError) and error.client:
                with self._changed:
                    self._forged[error.client] = why
                    self._fault(error.client, why)
                    lost.discard(error.client)
            return True
        finally:
            with self._changed:
                self._done -= lost

    def _session(
        self,
        lost: set[str],
        stop: Callable[[], bool],
        gone: Callable[[str], bool],
        minimum: int,
    ) -> bool:
        with self._changed:
            there = [n for n in self._asked if n in self._done and n not in self._faults]
            lost |= self._asked.keys() - self._done
            self._done |= lost
        self._credentials = {}
        few = self._threshold
        masked = self.server.mask(few, None if few else NEIGHBORS, there, least=few,
                                  minimum=minimum, run=self.run.hex())  # fmt: skip
        session = masked.session
        about = dict(run=session.run, names=list(session.names), threshold=session.threshold,
                     degree=session.degree, least=session.least)  # fmt: skip
        parts = dict.fromkeys(there, (BEGIN, json.dumps(about).encode()))
        for kind in (KEYS, SHARES, MASKED, REVEALED):
            with self._changed:
                self._done -= parts.keys()
            for name, own in parts.items():
                self._post(name, wire.Step(session.round, own))
            # What may have been revealed is recorded, also where the run is to stop.
            if not self._wait(time.monotonic() + self._patience, stop, gone) and kind != REVEALED:
                return False
            with self._changed:
                lost |= self._asked.keys() - self._done
                self._done |= lost
                if kind != REVEALED:
                    sent = masked.close()
                    parts = {n: (kind, m, *self._shown(kind, n)) for n, m in sent.items()}
        total, names = masked.total()
        self.server.terms.check_sum(total, len(names))
        return True

    def _shown(self, kind: bytes, name: str) -> list[bytes]:
        """With others' keys go the certificates that vouch for them."""
        if kind != KEYS or self.server.masked is None:
            return []
        near = self.server.masked.session.neighbors(name) & self._credentials.keys()
        return [part for other in near for part in (other.encode(), self._credentials[other])]

    def _take(self, name: str, message: wire.Message) -> wire.Ask | None:
        masked = self.server.masked
        if not isinstance(message, wire.Step):
            return super()._take(name, message)
        if masked is None:  # the session has ended without a sum, or has not begun
            self._late(name)
            return None
        if not message.parts:
            raise ValueError("a step of nothing")
        body, *shown = message.parts
        if masked.step == body[4:5] == KEYS:
            if not shown:
                raise ValueError("it shows no certificate")
            self._directory[name] = secure.holder(shown[0], name, self._authority)
            self._credentials[name] = shown[0]
        if not masked.receive(name, body):  # of a step before, which a network may repeat
            self._late(name)
            return None
        self._count(name, payload_up=sum(map(len, message.parts)))
        self._done.add(name)
        if masked.step == REVEALED:
            self._look(masked)
        return None

    def _look(self, masked: secure.Server) -> None:
        """Whether enough has been revealed: who is slow then need not be waited for."""
        try:
            masked.total()
        except secure.SecureError:
            return  # more may come; what is forged is told at the end
        self._done |= self._asked.keys()
        self._changed.notify_all()
