"""A run as one small file to send: scalars and header, in the safetensors format.

Tensors: ``scalars`` float32 [R, K, P], NaN in the rounds nobody answered; ``learning_rates``
float32 [R] if they follow a schedule; ``header`` the ledger's header as compressed JSON (of its
``about`` no more than ``train``, and ``about`` only where there is one);
``digest`` uint32 [2] of the last state; ``sha256`` of all of these. A file has one way to
be written only, so any byte that has changed is found.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hiso_jax._engine import files
from hiso_jax.ledger import digests
from hiso_jax.ledger import header as headers

MOST_TEXT = 2**26
"""Bytes of a header when it is not compressed: of zeros a small file could hold gigabytes."""


class BadFile(ValueError):
    """The bytes are not as they were written."""


def write(
    path: str | os.PathLike[str],
    header: dict[str, Any],
    scalars: np.ndarray,
    learning_rates: np.ndarray | None,
    digest: str | None,
) -> int:
    """Write the file whole or not at all; return its number of bytes.

    Args:
      path: replaced if it is there.
      header: plain data.
      scalars: float32 [R, K, P].
      learning_rates: float32 [R], or None.
      digest: sixteen hexadecimal digits, or None.
    """
    content = _encode(header, scalars, learning_rates, digest)
    with files.atomic_write(path) as part:
        part.write_bytes(content)
    return len(content)


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None, str | None]:
    """Return header, scalars, learning rates and digest, as they were given to `write`.

    Raises:
      BadFile: any byte has changed, or is missing; or the parts do not fit one another.
    """
    content = Path(path).read_bytes()
    try:
        tensors = load(content)
        scalars, rates = tensors["scalars"], tensors.get("learning_rates")
        text = zlib.decompressobj().decompress(tensors["header"].tobytes(), MOST_TEXT)
        header = json.loads(text)
        digest = digests.text(tensors["digest"]) if "digest" in tensors else None
        same = _encode(header, scalars, rates, digest) == content
        headers.check(header)
    except (SafetensorError, LookupError, ValueError, TypeError, RecursionError,
            zlib.error) as error:  # fmt: skip
        raise BadFile(f"not a compact ledger, or edited: {error}") from error
    scheduled = header["algorithm"]["learning_rate"] == "schedule"
    if scheduled != (rates is not None) or scalars.shape[1:] != headers.shape(header):
        same = False
    if rates is not None and (rates.shape != scalars.shape[:1] or not np.isfinite(rates).all()):
        same = False
    if not same:
        raise BadFile("it is not as it was written")
    return header, scalars, rates, digest


def _encode(
    header: dict[str, Any],
    scalars: np.ndarray,
    rates: np.ndarray | None,
    digest: str | None,
) -> bytes:
    tensors = {
        "header": np.frombuffer(zlib.compress(headers.canonical(header).encode(), 9), np.uint8),
        "scalars": np.ascontiguousarray(scalars, np.float32),
    }
    if rates is not None:
        tensors["learning_rates"] = np.ascontiguousarray(rates, np.float32)
    if digest is not None:
        tensors["digest"] = digests.parse(digest)
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tensors[name].shape}".encode() + tensors[name].tobytes())
    tensors["sha256"] = np.frombuffer(total.digest(), np.uint8)
    return save(tensors)
