"""A client of a masked round: what it sends in four steps, and what it refuses to say.

keys     = client.advertise()           # its public keys, signed by its site
shares   = client.share(keys of others) # shares of its two secrets, encrypted to each
masked   = client.mask(shares, vector)  # the vector under its own mask and all pads
revealed = client.unmask(request)       # one share a client: of its mask, or of its pads
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hiso_jax._engine import files, locks
from hiso_jax.secure import pads, primitives
from hiso_jax.secure import session as sessions
from hiso_jax.secure.primitives import SecureError, TooFew
from hiso_jax.secure.session import KEYS, MASKED, REVEALED, SHARES, Session

_KINDS = (b"pads", b"own")


class Journal:
    """The last round that a client has given a vector for, so that it gives one a round.

    Two sums of one round that differ by a few clients would show what these few sent, with the
    noise of few. A journal on disk keeps this from happening after a crash as well: the round
    of the crash is void. Any number of processes may share it: it has a lock, ``.NAME.lock``
    beside it.

    Args:
      path: of a small file; None to remember it in this process only.

    Raises:
      ValueError: the file is no journal.

    Example:
      >>> journal = Journal()
      >>> journal.take("run", 3)
      >>> journal.take("run", 3)
      Traceback (most recent call last):
      hiso_jax.secure.primitives.SecureError: round 3 of run 'run': a vector was given for round \
3 before; another one would show what the first one hid
    """

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self._path = None if path is None else Path(path)
        self._last: dict[str, int] = {}
        self._read()

    def _read(self) -> None:
        """Learn what other processes have noted; a file that has gone takes nothing back."""
        if self._path is None or not self._path.exists():
            return
        lines = [x.partition(" ") for x in self._path.read_text().splitlines()]
        if not all(last.isdecimal() and run for last, _, run in lines):
            raise ValueError(
                f"path: {self._path} is no journal: expected lines of a round and a run"
            )
        for last, _, run in lines:
            self._last[run] = max(int(last), self._last.get(run, -1))

    def take(self, run: str, round: int) -> None:
        """Note that a vector is about to leave; it is on disk when this returns.

        Raises:
          SecureError: one has left for this round or a later one, whichever process gave it; or
            the run's name, which may be the server's word, is not a line of text.
          ValueError: the file is no journal any more.
          OSError: it cannot be written; no vector may leave.
        """
        if run.splitlines() != [run]:
            raise SecureError(f"run: expected one line of text, got {run!r}")
        if self._path is None:
            return self._take(run, round)
        with locks.held(self._path.with_name(f".{self._path.name}.lock")):
            self._read()
            return self._take(run, round)

    def _take(self, run: str, round: int) -> None:
        if (last := self._last.get(run, -1)) >= round:
            raise SecureError(f"round {round} of run {run!r}: a vector was given for round {last} "
                              "before; another one would show what the first one hid")  # fmt: skip
        noted = self._last | {run: round}
        if self._path is not None:
            with files.atomic_write(self._path) as part:
                part.write_text("".join(f"{last} {name}\n" for name, last in noted.items()))
        self._last = noted


class Client:
    """One client in one session. Its steps are taken once, in order.

    Args:
      session: as the server has it.
      name: the client's, one of the session's.
      site_key: Ed25519 private key [32] of its site.
      directory: Ed25519 public keys [32] of all sites by name, from a source that the server
        cannot change, such as certificates.
      journal: of the client, over all rounds.
      random: where secrets come from; for tests.

    Raises:
      SecureError: the client was not asked.
      ImportError: without the extra ``secure``.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        site_key: bytes,
        directory: Mapping[str, bytes],
        journal: Journal | None = None,
        random: Callable[[int], bytes] = os.urandom,
    ):
        if name not in session.names:
            raise SecureError(f"client {name!r} was not asked in round {session.round}")
        self.session, self.name, self._directory = session, name, directory
        self._site_key, self._journal = site_key, Journal() if journal is None else journal
        self._seal_key = random(32)
        self._seeds = {kind: random(primitives.SEED) for kind in _KINDS}
        self._pads_key = pads.private(session, name, self._seeds[b"pads"])
        self._keys: dict[str, sessions.Advertised] = {}
        self._held: dict[str, dict[bytes, bytes]] = {}  # owner -> kind -> the share held here
        self._sent: dict[bytes, bytes] = {}
        self._answered = b""

    def advertise(self) -> bytes:
        """The first message: public keys of this round, signed by the site."""
        keys = [primitives.public(key) for key in (self._seal_key, self._pads_key)]
        signed = self.session.about(KEYS, self.name.encode(), *keys)
        signature = primitives.sign(self._site_key, signed)
        return sessions.pack(KEYS, self.session, self.name, [*keys, signature])

    def share(self, keys: bytes) -> bytes:
        """The second message: shares of the client's secrets, each sealed for who holds it.

        Args:
          keys: the server's: the first messages of this client's neighbors.

        Raises:
          TooFew: fewer than the threshold are there.
          SecureError: keys that are forged, swapped or repeated, by name.
        """
        self._once(SHARES)
        fields = sessions.unpack(KEYS, self.session, "", keys)
        found: dict[str, sessions.Advertised] = {}
        for name_, message in sessions.groups(fields, (None, None), "the server"):
            name = self._neighbor(name_, found)
            found[name] = sessions.read_keys(self.session, self._directory, name, message)
        public = [primitives.public(self._seal_key), primitives.public(self._pads_key)]
        for name, theirs in found.items():
            for key in (theirs.seal, theirs.pads):
                if key in public:
                    raise SecureError.of(name, f"its key is repeated: {key.hex()}")
                public.append(key)
        self._enough(found, "advertised keys")
        self._keys = found
        circle, session = self.session.circle(self.name), self.session
        dealt = {
            kind: dict(zip(circle, primitives.split(session.threshold, len(circle), seed),
                           strict=True))
            for kind, seed in self._seeds.items()
        }  # fmt: skip
        self._held[self.name] = {kind: shares[self.name] for kind, shares in dealt.items()}
        out = [sessions.commitment(session, b"seed", self.name, "", self._seeds[b"own"])]
        for holder in circle:
            if holder != self.name and holder not in found:
                continue
            both = [dealt[kind][holder] for kind in _KINDS]
            sealed = b"" if holder == self.name else self._seal(holder, b"".join(both))
            committed = [
                sessions.commitment(session, kind, self.name, holder, share)
                for kind, share in zip(_KINDS, both, strict=True)
            ]
            out += [holder.encode(), sealed, *committed]
        return self._keep(SHARES, out)

    def mask(self, shares: bytes, vector: np.ndarray) -> bytes:
        """The third message: the vector under the client's own mask and its pads.

        Args:
          shares: the server's: what its neighbors have sealed for this client.
          vector: int64 [length].

        Raises:
          TooFew: fewer than the threshold have shared.
          SecureError: shares that are forged, swapped or repeated, by name; a vector was given
            for this round before.
          ValueError: the vector has another shape or dtype.
        """
        self._once(MASKED, after=SHARES)
        vector = np.asarray(vector)
        if vector.dtype != np.int64 or vector.shape != (self.session.length,):
            raise ValueError(f"vector: client {self.name!r}: expected int64 "
                             f"[{self.session.length}], got {vector.dtype} "
                             f"{list(vector.shape)}")  # fmt: skip
        fields = sessions.unpack(SHARES, self.session, "", shares)
        held: dict[str, dict[bytes, bytes]] = {}
        sizes = (None, None, 32, 32)
        for name_, sealed, *committed in sessions.groups(fields, sizes, "the server"):
            name = self._neighbor(name_, held)
            held[name] = self._open(name, sealed, committed)
        self._enough(held, "shared")
        self._journal.take(self.session.run, self.session.round)
        self._held |= held
        masked = vector.astype(np.uint64) + pads.own(self.session, self.name, self._seeds[b"own"])
        for name in held:
            key = self._keys[name].pads
            masked = masked + pads.pair(self.session, self.name, self._pads_key, name, key)
        return self._keep(MASKED, [masked.astype("<u8").tobytes()])

    def unmask(self, request: bytes) -> bytes:
        """The last message: of who is there a share of the own mask, of who is gone of the pads.

        It never gives both of one client: with both, a reply that comes late could be read.
        The same request gets the same answer; any other is refused.

        Args:
          request: the server's: who is there and who is gone.

        Raises:
          TooFew: fewer than the threshold, or than `least`, are there.
          SecureError: somebody is both, or in neither list, or is no neighbor; a second request.
        """
        if REVEALED in self._sent:
            if request != self._answered:
                raise SecureError(f"client {self.name!r} has answered another list of who is gone; "
                                  "two answers could show what one hides")  # fmt: skip
            return self._sent[REVEALED]
        self._once(REVEALED, after=MASKED)
        fields = sessions.unpack(REVEALED, self.session, "", request)
        if not fields or len(fields[0]) != 4:
            raise SecureError("the server: its request does not say how many are there")
        count = int.from_bytes(fields[0], "big")
        if count < self.session.least:
            raise TooFew(f"{count} clients are there, a sum needs {self.session.least}")
        there: dict[str, bool] = {}
        for name_, flag in sessions.groups(fields[1:], (None, 1), "the server"):
            if (name := name_.decode(errors="replace")) in there:
                raise SecureError(f"the server names client {name!r} twice")
            there[name] = flag == b"\x01"
        if there.keys() != self._held.keys():
            other = sorted(there.keys() ^ self._held.keys())
            raise SecureError(f"the server's lists lack, or have for nothing, {other}")
        if not there[self.name]:
            raise SecureError(f"the server says that client {self.name!r} itself is gone")
        self._enough({k for k, v in there.items() if v and k != self.name}, "sent vectors")
        out: list[bytes] = []
        for name, here in there.items():
            out += [name.encode(), self._held[name][b"own" if here else b"pads"]]
        self._answered = request
        return self._keep(REVEALED, out)

    def _once(self, kind: bytes, after: bytes | None = None) -> None:
        if kind in self._sent or (after is not None and after not in self._sent):
            done = b"".join(self._sent).decode() or "nothing"
            raise SecureError(f"client {self.name!r}: step {kind.decode()} is out of order; it has "
                              f"sent {done} after its keys")  # fmt: skip

    def _keep(self, kind: bytes, fields: list[bytes]) -> bytes:
        self._sent[kind] = sessions.pack(kind, self.session, self.name, fields)
        return self._sent[kind]

    def _enough(self, others: object, what: str) -> None:
        count = len(others) + 1  # pyright: ignore[reportArgumentType]
        if count < self.session.threshold:
            raise TooFew(f"{count} of client {self.name!r} and its neighbors have {what}, the "
                         f"threshold is {self.session.threshold}")  # fmt: skip

    def _neighbor(self, field: bytes, seen: Mapping[str, object]) -> str:
        name = field.decode(errors="replace")
        if name not in self.session.neighbors(self.name):
            raise SecureError(f"client {name!r} is no neighbor of {self.name!r}")
        if name in seen:
            raise SecureError(f"client {name!r} is there twice: repeated keys or shares")
        if self._keys and name not in self._keys:
            raise SecureError(f"client {name!r} has shared without keys")
        return name

    def _sealing(self, sender: str, receiver: str, other: str) -> tuple[bytes, bytes]:
        """Key and associated data of what one seals for another."""
        about = self.session.about(b"seal", sender.encode(), receiver.encode())
        secret = primitives.agree(self._seal_key, self._keys[other].seal)
        return primitives.derive(secret, about), about

    def _seal(self, receiver: str, plain: bytes) -> bytes:
        key, about = self._sealing(self.name, receiver, receiver)
        return primitives.seal(key, plain, about)

    def _open(self, owner: str, sealed: bytes, committed: list[bytes]) -> dict[bytes, bytes]:
        """The shares that a neighbor has sealed for this client."""
        key, about = self._sealing(owner, self.name, owner)
        plain = primitives.unseal(key, sealed, about)
        if plain is None or len(plain) != 2 * primitives.SEED:
            raise SecureError.of(owner, f"its shares for {self.name!r} are forged or swapped")
        both: dict[bytes, bytes] = dict(
            zip(_KINDS, (plain[: primitives.SEED], plain[primitives.SEED :]), strict=True)
        )
        for (kind, share), wanted in zip(both.items(), committed, strict=True):
            if sessions.commitment(self.session, kind, owner, self.name, share) != wanted:
                raise SecureError.of(owner, f"its share for {self.name!r} is not the one that it "
                                     "has committed to")  # fmt: skip
        return both
