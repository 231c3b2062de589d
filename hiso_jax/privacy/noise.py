"""Discrete Gaussian noise from a secret: exact, on integers, and the same again for the same sum.

Noise is a function of a secret, of what it is for and of what it is added to (as the nonce of
RFC 6979 is). Whoever computes a release again after a crash therefore gives the same one, and two
different sums never get the same noise. Each run has a secret of its own (`of_run`), so neither do
two runs that measure the same.
"""

import hashlib
import hmac
import math
import os
import tempfile
from pathlib import Path

import numpy as np

from hiso_jax._engine import checks, files


def secret(path: str | os.PathLike[str]) -> bytes:
    """The secret [32] in a file, which is made from the system's randomness if it is not there.

    Args:
      path: of the file, readable by its owner only. Whoever has it can take the noise away;
        whoever loses it in the midst of a round must let that round be void.

    Raises:
      ValueError: the file does not hold 32 bytes; names it.
      OSError: it cannot be made; nothing is there then.
    """
    path = Path(path)
    if not path.exists():
        _make(path)
    return check_secret(f"path: {path}", path.read_bytes())


def _make(path: Path) -> None:
    """Put a new secret into its place, whole, unless another process is quicker."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-part-")  # mode 0600
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(os.urandom(32))
        files.sync(part)
        try:
            os.link(part, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links, where two at once may disagree
            if not path.exists():
                part.rename(path)
        files.settle(path)
    finally:
        part.unlink(missing_ok=True)


def of_run(secret: bytes, run: str) -> bytes:
    """The secret [32] of one run: another run's noise is another, also on the very same sum.

    Args:
      secret: from `hiso_jax.privacy.secret`.
      run: what tells it from others, in words of the secret's owner.

    Raises:
      ValueError: it is no secret.

    Example:
      >>> of_run(bytes(range(32)), "one") == of_run(bytes(range(32)), "other")
      False
    """
    return hmac.digest(check_secret("secret", secret), b"hiso-run " + run.encode(), "sha256")


def check_secret(argument: str, value: object) -> bytes:
    """Return a secret; raise unless it is 32 bytes or more that are not all the same."""
    if not isinstance(value, bytes) or len(value) < 32 or len(set(value)) == 1:
        length = f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__
        raise ValueError(f"{argument}: expected a secret of at least 32 random bytes, as of "
                         f"hiso_jax.privacy.secret, got {length}")  # fmt: skip
    return value


class Bits:
    """An endless stream of bits, a function of a secret and a purpose (HMAC, then SHAKE-256).

    Example:
      >>> one, two = (Bits(bytes(range(32)), b"purpose") for _ in range(2))
      >>> [one.below(10) for _ in range(5)] == [two.below(10) for _ in range(5)]
      True
    """

    def __init__(self, key: bytes, *purpose: bytes):
        parts = b"".join(len(part).to_bytes(8, "big") + part for part in purpose)
        self._seed = hmac.digest(key, parts, "sha256")
        self._block, self._at, self._count = b"", 0, 0

    def bits(self, count: int) -> int:
        """A number of so many random bits."""
        size = (count + 7) // 8
        while len(self._block) - self._at < size:
            more = hashlib.shake_256(self._seed + self._count.to_bytes(8, "big")).digest(1088)
            self._block, self._at = self._block[self._at :] + more, 0
            self._count += 1
        taken = self._block[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "big") >> (8 * size - count)

    def below(self, limit: int) -> int:
        """A whole number from 0 to ``limit - 1``, all alike."""
        count = (limit - 1).bit_length()
        while (value := self.bits(count)) >= limit:
            pass
        return value


def _is_exp(bits: Bits, over: int, under: int) -> bool:
    """True with probability exp(-over / under), exactly (Canonne et al. 2020, Algorithm 1)."""
    while over > under:
        if not _is_exp(bits, 1, 1):
            return False
        over -= under
    count = 1
    while bits.below(under * count) < over:
        count += 1
    return count % 2 == 1


def _laplace(bits: Bits, scale: int) -> int:
    """A discrete Laplace number of whole scale (Algorithm 2)."""
    while True:
        low = bits.below(scale)
        if not _is_exp(bits, low, scale):
            continue
        high = 0
        while _is_exp(bits, 1, 1):
            high += 1
        size, negative = low + scale * high, bits.bits(1)
        if size or not negative:
            return -size if negative else size


def discrete_gaussian(bits: Bits, variance: int, count: int) -> np.ndarray:
    """Discrete Gaussian numbers, int64 [count], P(x) in proportion to exp(-x^2 / (2 variance)).

    By rejection with whole numbers only, no floating point anywhere (Canonne, Kamath and Steinke
    2020, arXiv 2004.00010, Algorithm 3): what is drawn has exactly this law.

    Args:
      bits: where randomness comes from.
      variance: of the law in steps squared, a whole number >= 1 and at most 2^108.
      count: of numbers.

    Example:
      >>> drawn = discrete_gaussian(Bits(bytes(range(32))), 10_000, 2000)
      >>> bool(abs(drawn.std() - 100) < 6 and abs(drawn.mean()) < 8)
      True
    """
    checks.count("variance", variance)
    if variance > 2**108:
        raise ValueError(f"variance: expected at most 2^108, so that 64 bits hold what is drawn, "
                         f"got {variance}")  # fmt: skip
    scale = math.isqrt(variance) + 1
    out = np.empty(count, np.int64)
    for i in range(count):
        while True:
            value = _laplace(bits, scale)
            off = abs(value) * scale - variance
            if _is_exp(bits, off * off, 2 * variance * scale * scale):
                break
        out[i] = value
    return out
