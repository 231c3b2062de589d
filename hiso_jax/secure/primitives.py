"""The cryptography of secure aggregation, every piece from a library that is kept.

X25519, Ed25519, HKDF, ChaCha20 and ChaCha20-Poly1305 are those of ``cryptography``, Shamir's shares
those of ``pycryptodome``; both come with the extra ``secure``. Nothing here is invented: functions
of bytes give the libraries' functions one form.
"""

import hashlib
import importlib
from typing import Any

import numpy as np

from hiso_jax._engine import extras

SEED = 16
"""Bytes of what is shared: Shamir's shares of pycryptodome are of 16 bytes, 128 bits."""
SEALED = 2 * SEED + 16
"""Bytes of what is sealed: two shares, and what authenticates them."""


class SecureError(ValueError):
    """A message is not what the protocol asks for; the text names who sent it and what it is.

    Attributes:
      client: whose doing it is; empty where the text names nobody, or nobody for sure.
    """

    client = ""

    @classmethod
    def of(cls, client: str, what: str) -> "SecureError":
        """The error that is a client's doing.

        Example:
          >>> str(SecureError.of("ann", "its keys are forged"))
          "client 'ann': its keys are forged"
        """
        error = cls(f"client {client!r}: {what}")
        error.client = client
        return error


class TooFew(SecureError):
    """Fewer parties are left than may be: the round is void, and nothing of it is revealed."""


def library(name: str) -> Any:
    """A module of the extra ``secure``.

    Raises:
      ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        both = "cryptography and pycryptodome"
        raise ImportError(extras.needs("secure aggregation", both, "secure")) from error


_PRIMITIVES = "cryptography.hazmat.primitives"


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts, each with its length, so that no two lists look the same.

    Example:
      >>> digest(b"a", b"bc") == digest(b"ab", b"c")
      False
    """
    sum = hashlib.sha256()
    for part in parts:
        sum.update(len(part).to_bytes(8, "big") + part)
    return sum.digest()


def derive(secret: bytes, purpose: bytes, length: int = 32) -> bytes:
    """A key for one purpose from a secret (HKDF-SHA256).

    Example:
      >>> derive(b"secret", b"one") == derive(b"secret", b"other")
      False
    """
    hkdf = library(f"{_PRIMITIVES}.kdf.hkdf")
    algorithm = library(f"{_PRIMITIVES}.hashes").SHA256()
    return hkdf.HKDF(algorithm=algorithm, length=length, salt=None, info=purpose).derive(secret)


def stream(key: bytes, length: int) -> np.ndarray:
    """So many words, uint64 [length], of the ChaCha20 stream of a key that is used once.

    Example:
      >>> stream(bytes(32), 2).tolist()
      [10393729187455219830, 2935650227004792128]
    """
    ciphers = library(f"{_PRIMITIVES}.ciphers")
    algorithm = library(f"{_PRIMITIVES}.ciphers.algorithms").ChaCha20(key, bytes(16))
    encryptor = ciphers.Cipher(algorithm, mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * length)), "<u8").astype(np.uint64)


def public(private: bytes) -> bytes:
    """The X25519 public key [32] of a private one [32]."""
    return _x25519().X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, other: bytes) -> bytes:
    """The secret [32] of two parties, by X25519.

    Raises:
      SecureError: the other's key is none that can be agreed with (it makes a secret of zeros).

    Example:
      >>> a, b = bytes(range(32)), bytes(range(1, 33))
      >>> agree(a, public(b)) == agree(b, public(a))
      True
    """
    x25519 = _x25519()
    key = x25519.X25519PrivateKey.from_private_bytes(private)
    try:
        return key.exchange(x25519.X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise SecureError(f"no X25519 key: {other.hex()}") from error


def _x25519() -> Any:
    return library(f"{_PRIMITIVES}.asymmetric.x25519")


def _ed25519() -> Any:
    return library(f"{_PRIMITIVES}.asymmetric.ed25519")


def site_public(private: bytes) -> bytes:
    """The Ed25519 public key [32] of a site's private one [32], for the directory."""
    return _ed25519().Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def sign(private: bytes, message: bytes) -> bytes:
    """A site's Ed25519 signature [64]."""
    return _ed25519().Ed25519PrivateKey.from_private_bytes(private).sign(message)


def is_signed(site: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature is that of the site with this public key.

    Example:
      >>> key = bytes(32)
      >>> signature = sign(key, b"hello")
      >>> [is_signed(site_public(key), text, signature) for text in (b"hello", b"hullo")]
      [True, False]
    """
    wrong = library("cryptography.exceptions").InvalidSignature
    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(site).verify(signature, message)
    except (wrong, ValueError):
        return False
    return True


def seal(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate, with a key that is used once (ChaCha20-Poly1305)."""
    aead = library(f"{_PRIMITIVES}.ciphers.aead")
    return aead.ChaCha20Poly1305(key).encrypt(bytes(12), plain, about)


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes | None:
    """The inverse of `seal`; None if it is not as it was sealed.

    Example:
      >>> sealed = seal(bytes(32), b"share", b"ann to bob")
      >>> unseal(bytes(32), sealed, b"ann to bob"), unseal(bytes(32), sealed, b"bob to ann")
      (b'share', None)
    """
    aead = library(f"{_PRIMITIVES}.ciphers.aead")
    wrong = library("cryptography.exceptions").InvalidTag
    try:
        return aead.ChaCha20Poly1305(key).decrypt(bytes(12), sealed, about)
    except (wrong, ValueError):
        return None


def split(threshold: int, count: int, secret: bytes) -> list[bytes]:
    """Shamir's shares [count] of a secret of `SEED` bytes; any `threshold` of them make it again.

    Example:
      >>> shares = split(2, 3, b"sixteen bytes ..")
      >>> combine({0: shares[0], 2: shares[2]})
      b'sixteen bytes ..'
    """
    shamir = library("Crypto.Protocol.SecretSharing").Shamir
    return [bytes(share) for _, share in sorted(shamir.split(threshold, count, secret))]


def combine(shares: dict[int, bytes]) -> bytes:
    """The secret of exactly `threshold` shares, each under its place in the list of `split`."""
    shamir = library("Crypto.Protocol.SecretSharing").Shamir
    return bytes(shamir.combine([(place + 1, share) for place, share in shares.items()]))
