"""What the server sees of a round: a sum of integers, and of no client its own.

Double masking with dropouts after Bonawitz et al. (CCS 2017, 10.1145/3133956.3133982), and with
`Session.degree` after Bell et al. (CCS 2020, 10.1145/3372297.3417885), for a server that follows
the protocol and wants to know more. Client and server are values that make and take bytes; who
carries them is no matter of theirs. It needs the extra ``secure``.

Example:
  >>> from hiso_jax import secure
  >>> session = secure.Session("run", 0, ("ann", "bob", "cem", "dia"), length=6)
  >>> session.threshold, session.least  # of four; one may be gone
  (3, 3)
"""

from hiso_jax.secure.certificates import Identity, holder
from hiso_jax.secure.client import Client, Journal
from hiso_jax.secure.primitives import SecureError, TooFew, site_public
from hiso_jax.secure.server import Server
from hiso_jax.secure.session import Session, two_thirds
from hiso_jax.secure.together import run

__all__ = ["Client", "Identity", "Journal", "SecureError", "Server", "Session", "TooFew", "holder",
           "run", "site_public", "two_thirds"]  # fmt: skip
