"""What all parties of a masked round know beforehand, and the form of what they say.

A `Session` is the same for server and clients; its digest is in all they say, so that nothing
of one round, roster or run passes for something of another. A message is bytes: its kind, that
digest, who sends it, and fields.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from hiso_jax._engine import checks
from hiso_jax.secure.primitives import SecureError, digest, is_signed

KEYS, SHARES, MASKED, REVEALED = b"K", b"S", b"M", b"R"
"""Kinds of message, in the order in which a client sends them."""
_MAGIC = b"hsa1"


def two_thirds(of: int) -> int:
    """More than two thirds of so many, 2 at least: by default a sum is revealed of no fewer."""
    return max(2, 2 * of // 3 + 1)


@dataclasses.dataclass(frozen=True)
class Session:
    """One masked round: who is asked, and how many may be missing.

    With `degree`, a client has pads with and deals shares to so many others only, its neighbors on
    a circle that is shuffled by the session's digest (Bell et al., CCS 2020); without, to all
    (Bonawitz et al., CCS 2017).

    Attributes:
      run: which run it is, such as the digest of a ledger's header.
      round: its number.
      names: who is asked, in the order of asking.
      length: numbers of a client's vector.
      threshold: shares that unmask a client, of those that its `degree` neighbors and it itself
        hold: more than half of them, so that a server that tells two stories about who is gone
        does not get enough of both kinds. By default two thirds.
      degree: how many neighbors a client has, even; None for all others.
      least: fewest clients that a sum is revealed of, 2 or more; by default two thirds.

    Raises:
      ValueError: a field is out of its range.

    Example:
      >>> session = Session("run", 0, ("ann", "bob", "cem"), length=3)
      >>> session.threshold, session.least, session.neighbors("bob") == {"ann", "cem"}
      (3, 3, True)
    """

    run: str
    round: int
    names: tuple[str, ...]
    length: int
    threshold: int = 0
    degree: int | None = None
    least: int = 0

    def __post_init__(self) -> None:
        names = tuple(checks.clients("names", self.names))
        object.__setattr__(self, "names", names)
        checks.count("length", self.length)
        checks.number("round", self.round, 0, 2**63 - 1)
        if len(names) < 2:
            raise ValueError(f"names: expected at least 2, since the sum of one hides nothing, "
                             f"got {list(names)}")  # fmt: skip
        degree = self.degree
        if degree is not None:
            checks.count("degree", degree)
            if degree % 2:
                raise ValueError(f"degree: expected an even number, got {degree}")
            object.__setattr__(self, "degree", None if degree >= len(names) - 1 else degree)
        circle = self.circle_size
        for field, of in (("threshold", circle), ("least", len(names))):
            if getattr(self, field) == 0:
                object.__setattr__(self, field, two_thirds(of))
        if not circle / 2 < self.threshold <= circle:
            raise ValueError(f"threshold: expected more than half of {circle} (a client and its "
                             f"neighbors) and not more, got {self.threshold}")  # fmt: skip
        if not 2 <= self.least <= len(names):
            raise ValueError(f"least: expected 2 to {len(names)}, got {self.least}")

    @property
    def circle_size(self) -> int:
        """How many hold shares of a client's secrets: it and its neighbors."""
        return len(self.names) if self.degree is None else self.degree + 1

    @cached_property
    def context(self) -> bytes:
        """Digest of all that is agreed on, [32]."""
        numbers = (self.round, self.length, self.threshold, self.degree or 0, self.least)
        text = ",".join(map(str, numbers)).encode()
        return digest(_MAGIC, self.run.encode(), text, *(name.encode() for name in self.names))

    @cached_property
    def _order(self) -> list[str]:
        return sorted(self.names, key=lambda name: digest(b"circle", self.context, name.encode()))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._order)}

    def circle(self, name: str) -> list[str]:
        """Who holds shares of a client's secrets, by their places; it is among them."""
        if self.degree is None:
            return self._order
        at, half = self._places[name], self.degree // 2
        return [self._order[(at + i) % len(self._order)] for i in range(-half, half + 1)]

    def neighbors(self, name: str) -> set[str]:
        """With whom a client has pads."""
        return set(self.circle(name)) - {name}

    def about(self, *parts: bytes) -> bytes:
        """Bytes that stand for these parts in this session and no other."""
        return digest(self.context, *parts)


def pack(kind: bytes, session: Session, sender: str, fields: Sequence[bytes]) -> bytes:
    """A message as bytes; the server is the sender ``""``."""
    parts = [sender.encode(), *fields]
    body = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return _MAGIC + kind + session.context + body


def unpack(kind: bytes, session: Session, sender: str, message: bytes) -> list[bytes]:
    """The fields of a message.

    Raises:
      SecureError: it is of another kind, session or sender, or cut off; names the sender.

    Example:
      >>> session = Session("run", 0, ("ann", "bob"), length=1)
      >>> unpack(KEYS, session, "ann", pack(KEYS, session, "ann", [b"one", b""]))
      [b'one', b'']
    """
    who, start = f"client {sender!r}" if sender else "the server", len(_MAGIC) + 1 + 32
    if message[: len(_MAGIC) + 1] != _MAGIC + kind:
        raise SecureError(f"{who}: expected a message of kind {kind!r}, got {message[:5]!r}")
    if message[len(_MAGIC) + 1 : start] != session.context:
        raise SecureError(f"{who}: its message is of another session (round, roster or threshold)")
    fields, at = [], start
    while at < len(message):
        if len(fields) > 2 + 4 * session.circle_size:  # no step has more; empty ones cost nothing
            raise SecureError(f"{who}: its message has more fields than any step")
        size = int.from_bytes(message[at : at + 4], "big")
        fields.append(message[at + 4 : at + 4 + size])
        if len(message) < at + 4 + size:
            raise SecureError(f"{who}: its message of {len(message)} bytes is cut off")
        at += 4 + size
    if not fields or fields[0] != sender.encode():
        raise SecureError(f"{who}: its message names {fields[:1]} as its sender")
    return fields[1:]


def groups(fields: list[bytes], sizes: Sequence[int | None], who: str) -> list[list[bytes]]:
    """Fields in groups, each field of its size in bytes (None: any).

    Raises:
      SecureError: they are of other sizes or numbers; names `who`.
    """
    rows = [fields[i : i + len(sizes)] for i in range(0, len(fields), len(sizes))]
    for row in rows:
        if len(row) != len(sizes) or any(
            size is not None and len(field) != size for field, size in zip(row, sizes, strict=True)
        ):
            raise SecureError(f"{who}: its message has fields of {[len(f) for f in row]} bytes")
    return rows


class Advertised(NamedTuple):
    """A client's public keys of a round, with its site's word for them."""

    seal: bytes  # X25519: shares are sent to it encrypted
    pads: bytes  # X25519: of its pads
    signature: bytes  # Ed25519, by the site


def read_keys(
    session: Session, directory: Mapping[str, bytes], name: str, message: bytes
) -> Advertised:
    """The keys that a client has advertised, once their signature is that of its site.

    Raises:
      SecureError: the client was not asked, is in no directory, or its keys are not its own.
    """
    if name not in session.names:
        raise SecureError(f"client {name!r} was not asked in round {session.round}")
    if name not in directory:
        raise SecureError(f"directory: it has no key of client {name!r}")
    (row,) = groups(unpack(KEYS, session, name, message), (32, 32, 64), f"client {name!r}") or [
        [b""] * 3
    ]
    keys = Advertised(*row)
    signed = session.about(KEYS, name.encode(), keys.seal, keys.pads)
    if not is_signed(directory[name], signed, keys.signature):
        raise SecureError.of(name, "its keys are not signed by its site; they are forged, "
                             "or somebody swapped them")  # fmt: skip
    return keys


def commitment(session: Session, kind: bytes, owner: str, holder: str, secret: bytes) -> bytes:
    """What binds a client to a secret that it does not show: [32]."""
    return session.about(b"commit", kind, owner.encode(), holder.encode(), secret)
