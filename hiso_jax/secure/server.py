"""The server of a masked round: it passes messages on, and learns a sum or nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hiso_jax.secure import pads, primitives
from hiso_jax.secure import session as sessions
from hiso_jax.secure.primitives import SecureError, TooFew
from hiso_jax.secure.session import KEYS, MASKED, REVEALED, SHARES, Session

_STEPS = (KEYS, SHARES, MASKED, REVEALED)


class Server:
    """The server's side of one session: it takes messages of a step, then closes the step.

    What comes after its step was closed is not kept: its sender is gone, and whatever the others
    have revealed for that does not open it.

    Args:
      session: as the clients have it.
      directory: Ed25519 public keys [32] of all sites by name.
      on_reveal: called with the names of those in the sum before any of them is asked to reveal it;
        if it raises, nobody is.

    Example:
      >>> import numpy as np
      >>> from hiso_jax import secure
      >>> names = ("ann", "bob", "cem")
      >>> site_keys = {name: bytes([i]) * 32 for i, name in enumerate(names)}
      >>> directory = {name: secure.site_public(key) for name, key in site_keys.items()}
      >>> session = secure.Session("run", 0, names, length=2, threshold=2, least=2)
      >>> clients = {n: secure.Client(session, n, site_keys[n], directory) for n in names}
      >>> server = secure.Server(session, directory)
      >>> all(server.receive(n, client.advertise()) for n, client in clients.items())
      True
      >>> keys = server.close()
      >>> all(server.receive(n, client.share(keys[n])) for n, client in clients.items())
      True
      >>> shares = server.close()
      >>> for name in ("ann", "cem"):  # bob is gone
      ...     vector = np.array([-7, 1 if name == "ann" else 100])
      ...     _ = server.receive(name, clients[name].mask(shares[name], vector))
      >>> requests = server.close()
      >>> for name, request in requests.items():
      ...     _ = server.receive(name, clients[name].unmask(request))
      >>> total, names = server.total()
      >>> total.tolist(), names
      ([-14, 101], ['ann', 'cem'])
    """

    def __init__(
        self,
        session: Session,
        directory: Mapping[str, bytes],
        on_reveal: Callable[[list[str]], Any] = lambda names: None,
    ):
        self.session, self._directory, self._step = session, directory, 0
        self._on_reveal = on_reveal
        self._messages: dict[bytes, dict[str, bytes]] = {kind: {} for kind in _STEPS}
        self._keys: dict[str, sessions.Advertised] = {}
        # owner -> holder -> (sealed, commitments to the shares of pads and of the own mask)
        self._dealt: dict[str, dict[str, tuple[bytes, dict[bytes, bytes]]]] = {}
        self._seeds: dict[str, bytes] = {}  # owner -> commitment to the seed of its own mask
        self._vectors: dict[str, np.ndarray] = {}
        self._shares: dict[str, dict[int, bytes]] = {}  # owner -> place -> share
        self._gone: set[str] = set()
        self._total: tuple[np.ndarray, list[str]] | None = None

    @property
    def step(self) -> bytes:
        """The kind of message that is waited for; empty after the last."""
        return _STEPS[self._step] if self._step < len(_STEPS) else b""

    def receive(self, name: str, message: bytes) -> bool:
        """Take a client's message; return whether it counts.

        One that is late for its step does not count, nor does the same one again.

        Raises:
          SecureError: it is forged, of nobody who was asked, another one than before, or one
            of a step to come. What the client has sent before still counts.
        """
        kind = message[4:5]
        if kind not in _STEPS:
            raise SecureError(f"client {name!r}: expected a message of kinds {_STEPS}, got "
                              f"{message[:5]!r}")  # fmt: skip
        if name not in self.session.names:
            raise SecureError(f"client {name!r} was not asked in round {self.session.round}")
        before = self._messages[kind].get(name)
        if before is not None:
            if before != message:
                raise SecureError(
                    f"client {name!r}: a second message of kind {kind!r} differs from its first"
                )
            return False
        if (order := _STEPS.index(kind)) < self._step:
            return False
        if order > self._step:
            raise SecureError(f"client {name!r}: a message of kind {kind!r}, but the step is "
                              f"{self.step!r}")  # fmt: skip
        if order and name not in self._messages[_STEPS[order - 1]]:
            return False  # it was declared gone
        {KEYS: self._take_keys, SHARES: self._take_shares, MASKED: self._take_vector,
         REVEALED: self._take_revealed}[kind](name, message)  # fmt: skip
        self._messages[kind][name] = message
        return True

    def close(self) -> dict[str, bytes]:
        """End a step; return what to send to each client that is still there.

        Raises:
          TooFew: fewer than the threshold, or than `least`, are left; the round is void.
          SecureError: all steps are done.
        """
        kind = self.step
        if kind == REVEALED or not kind:
            raise SecureError("close: the last step ends with `total`")
        there = list(self._messages[kind])
        self._enough(there)
        if kind == MASKED:
            self._on_reveal(there)
        self._step += 1
        if kind == KEYS:
            return {name: self._keys_for(name) for name in there}
        if kind == SHARES:
            return {name: self._shares_for(name) for name in there}
        self._gone = self._messages[SHARES].keys() - self._messages[MASKED].keys()
        return {name: self._request_for(name) for name in there}

    def total(self) -> tuple[np.ndarray, list[str]]:
        """The sum over the clients whose vectors came, int64 [length], and their names.

        Asked again, it says the same.

        Raises:
          TooFew: too few have revealed shares so far; more may come, and it be asked again.
          SecureError: somebody's shares do not make what it has committed to, by name; or the
            steps before are not closed.
        """
        if self._total is not None:
            return self._total
        if self.step != REVEALED:
            raise SecureError(f"total: step {self.step!r} is not closed")
        names = [name for name in self.session.names if name in self._vectors]
        total = np.zeros(self.session.length, np.uint64)
        for name in names:
            seed = self._combine(name)
            if sessions.commitment(self.session, b"seed", name, "", seed) != self._seeds[name]:
                raise SecureError.of(name, "its shares do not make the mask that it has "
                                     "committed to")  # fmt: skip
            total = total + self._vectors[name] - pads.own(self.session, name, seed)
        for name in sorted(self._gone):
            left = self.session.neighbors(name) & self._vectors.keys()
            if not left:
                continue
            key = pads.private(self.session, name, self._combine(name))
            if primitives.public(key) != self._keys[name].pads:
                raise SecureError.of(name, "its shares do not make the key that it has "
                                     "advertised")  # fmt: skip
            for other in left:  # what it would have added, and they have taken away
                public = self._keys[other].pads
                total = total + pads.pair(self.session, name, key, other, public)
        self._step += 1
        self._total = total.astype(np.int64), names
        return self._total

    def _enough(self, there: list[str]) -> None:
        session = self.session
        if len(there) < session.least:
            raise TooFew(f"round {session.round}: {len(there)} clients are left after step "
                         f"{self.step!r}, a sum needs {session.least}")  # fmt: skip
        present = set(there)
        for name in there:
            if (count := len(present.intersection(session.circle(name)))) < session.threshold:
                raise TooFew(f"round {session.round}: {count} of client {name!r} and its neighbors "
                             f"are left after step {self.step!r}, the threshold is "
                             f"{session.threshold}")  # fmt: skip

    def _take_keys(self, name: str, message: bytes) -> None:
        keys = sessions.read_keys(self.session, self._directory, name, message)
        for key in (keys.seal, keys.pads):
            try:  # the others cannot refuse it later without leaving the round
                primitives.agree(bytes(32), key)
            except SecureError as error:
                raise SecureError.of(name, str(error)) from None
        for other, theirs in self._keys.items():
            if {keys.seal, keys.pads} & {theirs.seal, theirs.pads}:
                raise SecureError(f"client {name!r}: its key is repeated: client {other!r} has it")
        self._keys[name] = keys

    def _keys_for(self, name: str) -> bytes:
        sent = self._messages[KEYS]
        near = [other for other in self.session.circle(name) if other != name and other in sent]
        fields = [part for other in near for part in (other.encode(), sent[other])]
        return sessions.pack(KEYS, self.session, "", fields)

    def _take_shares(self, name: str, message: bytes) -> None:
        who = f"client {name!r}"
        seed, *fields = sessions.unpack(SHARES, self.session, name, message) or [b""]
        dealt: dict[str, tuple[bytes, dict[bytes, bytes]]] = {}
        for field, sealed, first, second in sessions.groups(fields, (None, None, 32, 32), who):
            holder = field.decode(errors="replace")
            if holder in dealt:
                raise SecureError(f"{who}: two shares for client {holder!r}")
            if len(sealed) != (0 if holder == name else primitives.SEALED):
                raise SecureError(f"{who}: {len(sealed)} bytes are no shares for {holder!r}")
            dealt[holder] = sealed, {b"pads": first, b"own": second}
        wanted = {other for other in self.session.circle(name) if other in self._messages[KEYS]}
        if dealt.keys() != wanted or len(seed) != 32:
            raise SecureError(f"{who}: expected shares for {sorted(wanted)}, got {sorted(dealt)}")
        self._dealt[name], self._seeds[name] = dealt, seed

    def _shares_for(self, name: str) -> bytes:
        fields: list[bytes] = []
        for owner in self.session.circle(name):
            if owner != name and owner in self._dealt:
                sealed, committed = self._dealt[owner][name]
                fields += [owner.encode(), sealed, committed[b"pads"], committed[b"own"]]
        return sessions.pack(SHARES, self.session, "", fields)

    def _take_vector(self, name: str, message: bytes) -> None:
        length = 8 * self.session.length
        fields = sessions.unpack(MASKED, self.session, name, message)
        ((data,),) = sessions.groups(fields, (length,), f"client {name!r}") or [[b""]]
        if len(fields) != 1:
            raise SecureError(f"client {name!r}: expected one vector, got {len(fields)}")
        self._vectors[name] = np.frombuffer(data, "<u8").astype(np.uint64)

    def _request_for(self, name: str) -> bytes:
        fields = [len(self._vectors).to_bytes(4, "big")]
        for other in self.session.circle(name):
            if other in self._dealt:
                fields += [other.encode(), bytes([other in self._vectors])]
        return sessions.pack(REVEALED, self.session, "", fields)

    def _take_revealed(self, name: str, message: bytes) -> None:
        who = f"client {name!r}"
        fields = sessions.unpack(REVEALED, self.session, name, message)
        found: dict[str, bytes] = {}
        for field, share in sessions.groups(fields, (None, primitives.SEED), who):
            owner = field.decode(errors="replace")
            if owner in found:
                raise SecureError(f"{who}: two shares of client {owner!r}")
            if name not in self._dealt.get(owner, {}):
                raise SecureError(f"{who}: it holds no share of client {owner!r}")
            kind = b"own" if owner in self._vectors else b"pads"
            committed = self._dealt[owner][name][1][kind]
            if sessions.commitment(self.session, kind, owner, name, share) != committed:
                raise SecureError(f"{who}: its share of client {owner!r} is forged: it is not the "
                                  "one that was dealt to it")  # fmt: skip
            found[owner] = share
        for owner, share in found.items():
            place = self.session.circle(owner).index(name)
            self._shares.setdefault(owner, {})[place] = share

    def _combine(self, owner: str) -> bytes:
        shares, threshold = self._shares.get(owner, {}), self.session.threshold
        if len(shares) < threshold:
            raise TooFew(f"round {self.session.round}: {len(shares)} shares of client {owner!r} "
                         f"were revealed, the threshold is {threshold}")  # fmt: skip
        return primitives.combine(dict(sorted(shares.items())[:threshold]))
