"""A site's key of masked rounds, vouched for by the certificate that it was provisioned with.

A startup kit has the site's private key, its certificate and that of the authority that signed it.
The key of masked rounds is derived from the private key, and the certificate's owner signs it:
whoever has the authority's certificate can tell whose key it is, and a server that passes keys on
cannot put its own in their place.
"""

import datetime
from typing import Any

from hiso_jax.secure import primitives
from hiso_jax.secure.primitives import SecureError

_PURPOSE = b"hiso_jax: key of masked rounds"


class Identity:
    """A site's own: what it signs with, and what it shows of that.

    Args:
      private: the site's private key, PEM, RSA or elliptic.
      certificate: the site's, PEM.

    Attributes:
      key: Ed25519 private key [32] of `hiso_jax.secure.Client`.
      credential: bytes by which others know it, see `holder`.

    Raises:
      ValueError: one of them is none.
      ImportError: without the extra ``secure``.
    """

    def __init__(self, private: bytes, certificate: bytes):
        x509, encodings = _library()
        owner = encodings.load_pem_private_key(private, password=None)
        whole = owner.private_bytes(
            encodings.Encoding.DER, encodings.PrivateFormat.PKCS8, encodings.NoEncryption()
        )
        self.key = primitives.derive(whole, _PURPOSE)
        public = primitives.site_public(self.key)
        shown = x509.load_pem_x509_certificate(certificate).public_bytes(encodings.Encoding.DER)
        signature = owner.sign(_PURPOSE + public, *_scheme(owner))
        self.credential = public + len(signature).to_bytes(2, "big") + signature + shown


def holder(credential: bytes, name: str, authority: bytes) -> bytes:
    """The Ed25519 public key [32] that a credential proves to be a site's.

    Args:
      credential: as of `Identity`; from anybody.
      name: of the site, the common name of its certificate.
      authority: the certificate that signs the sites', PEM, from one's own kit.

    Raises:
      SecureError: it proves nothing, or is another's; names the site.
    """
    x509, _ = _library()
    root = x509.load_pem_x509_certificate(authority)
    public, size = credential[:32], int.from_bytes(credential[32:34], "big")
    signature, shown = credential[34 : 34 + size], credential[34 + size :]
    try:
        certificate = x509.load_der_x509_certificate(shown)
        certificate.verify_directly_issued_by(root)
        (owner,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        proved = certificate.public_key()
        proved.verify(signature, _PURPOSE + public, *_scheme(proved))
    except Exception as error:  # of many kinds, all of which mean that it is not a site's
        raise SecureError.of(name, "its certificate, or what it has signed, is not of this "
                             f"authority ({type(error).__name__})") from error  # fmt: skip
    if owner.value != name:
        raise SecureError.of(name, f"its certificate is that of {owner.value!r}")
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise SecureError.of(
            name,
            f"its certificate was valid from {certificate.not_valid_before_utc:%Y-%m-%d} "
            f"to {certificate.not_valid_after_utc:%Y-%m-%d}",
        )
    return public


def _library() -> tuple[Any, Any]:
    load = primitives.library
    return load("cryptography.x509"), load("cryptography.hazmat.primitives.serialization")


def _scheme(key: Any) -> tuple[Any, ...]:
    """How such a key signs: by SHA-256, RSA with PSS."""
    load = primitives.library
    digest = load("cryptography.hazmat.primitives.hashes").SHA256()
    if not hasattr(key, "curve"):
        padding = load("cryptography.hazmat.primitives.asymmetric.padding")
        return padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH), digest
    return (load("cryptography.hazmat.primitives.asymmetric.ec").ECDSA(digest),)
