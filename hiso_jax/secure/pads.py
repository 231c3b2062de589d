"""What is added to a client's vector: its own mask, and a pad with each neighbor.

Both are streams of 64-bit words, and all sums are modulo 2^64. The pad of two clients is added by
one and taken away by the other, so in a sum over both it is gone.
"""

import numpy as np

from hiso_jax.secure import primitives
from hiso_jax.secure.session import Session


def own(session: Session, name: str, seed: bytes) -> np.ndarray:
    """A client's own mask, uint64 [length], of its seed [16]."""
    key = primitives.derive(seed, session.about(b"own", name.encode()))
    return primitives.stream(key, session.length)


def private(session: Session, name: str, seed: bytes) -> bytes:
    """The X25519 key [32] of a client's pads, of the seed [16] that is shared in its place."""
    return primitives.derive(seed, session.about(b"pads", name.encode()))


def pair(session: Session, name: str, key: bytes, other: str, public: bytes) -> np.ndarray:
    """What `name` adds for `other`, uint64 [length]: the negative of what `other` adds for it.

    Args:
      session: of the round.
      name: whose private key `key` is.
      key: X25519, [32].
      other: whose public key `public` is.
      public: X25519, [32].

    Example:
      >>> session = Session("run", 0, ("ann", "bob"), length=3)
      >>> keys = {name: private(session, name, bytes(16)) for name in session.names}
      >>> ann = pair(session, "ann", keys["ann"], "bob", primitives.public(keys["bob"]))
      >>> bob = pair(session, "bob", keys["bob"], "ann", primitives.public(keys["ann"]))
      >>> (ann + bob).tolist()
      [0, 0, 0]
    """
    first, second = sorted((name, other))
    purpose = session.about(b"pair", first.encode(), second.encode())
    pad = primitives.stream(
        primitives.derive(primitives.agree(key, public), purpose), session.length
    )
    return pad if name == first else np.zeros_like(pad) - pad
