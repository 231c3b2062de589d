"""What server and clients say to each other, as bytes; no engine, no network, no state.

Down goes the round, the digest that its state must have, and the records that the client
missed (or a snapshot, where that is shorter). Up go the scalars, K x P float32, and the digest
of the state that they were measured at: eight bytes, by which a client that holds another
model is noticed in the round in which that happens. All numbers are little-endian.

A message begins with ``b"hj"``, the number of this protocol, its kind, the eight bytes of the
run's identity (`identity`), and the round that is asked: what goes up says which round it answers,
so that a message that comes late is not taken for one of the round that is open. What is longer,
shorter or otherwise is refused by `parse`, whoever sent it, before anything is made of it.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hiso_jax.ledger import digests
from hiso_jax.ledger import header as headers

VERSION = 2
"""Of the messages."""
_HEAD = struct.Struct("<2sBB8sI")
_ASK = struct.Struct("<IIHB8s")
_BEHIND = struct.Struct("<I8s")
_APART = struct.Struct("<I")
MOST_ROUNDS = 2**20
"""Records, or digests, in one message."""
MOST_TEXT = 2**20
"""Bytes of a header, compressed; sixteen times that when it is not."""
MOST_STEP = 2**26
"""Bytes of a step of a masked round: what 2,000 neighbors have sealed, with their certificates."""
MOST_PARTS = 2**16
"""Of a step: name and certificate of each neighbor. Empty ones cost nothing to send."""

RATES, LAST, SNAPSHOT, RESET = 1, 2, 4, 8


class WireError(ValueError):
    """Bytes that are no message of this protocol."""


class Ask(NamedTuple):
    """Down: measure at the state after `round` rounds, or only come there."""

    round: int
    digest: np.ndarray  # uint32 [2] of the state after `round` rounds
    first: int  # round of the first record
    records: np.ndarray  # float32 [R, K, S]; none where nothing is missed
    rates: np.ndarray | None = None  # float32 [R], if they follow a schedule
    slot: int = 0  # place among the asked
    last: bool = False  # the run is over: nothing is to be measured
    reset: bool = False  # go back to the base model before anything else
    snapshot: bytes | None = None  # of the state after `round` rounds, in place of records


class Reply(NamedTuple):
    """Up: what was measured; of the last ask nothing."""

    round: int
    digest: np.ndarray  # uint32 [2] of the state it was measured at
    scalars: np.ndarray | None  # float32 [K, P]


class Behind(NamedTuple):
    """Up: where the client stands, when it cannot come to the round with what it was sent."""

    round: int
    held: int  # rounds that its state has gone through
    digest: np.ndarray  # uint32 [2] of that state


class Apart(NamedTuple):
    """Up: the client came to another digest; those that its states had."""

    round: int
    first: int  # rounds of the first of those states
    digests: np.ndarray  # uint32 [R, 2]


class Other(NamedTuple):
    """Up: the client is of another run; what it is made of."""

    round: int
    header: dict[str, Any]


class Failed(NamedTuple):
    """Up: the client could not do it; the kind of error only, since a text may hold data."""

    round: int
    kind: str
    blames: str = ""  # the client whose message of a masked round it refuses


class Step(NamedTuple):
    """Down and up: one of the four steps of a masked round, see `hiso_jax.federation.masked`."""

    round: int
    parts: tuple[bytes, ...]


Message = Ask | Reply | Behind | Apart | Other | Failed | Step
_KINDS: tuple[type, ...] = (Ask, Reply, Behind, Apart, Other, Failed, Step)


def identity(header: Mapping[str, Any]) -> bytes:
    """Eight bytes that tell whether two parties are of one run.

    They stand for the algorithm, the root key, the base model leaf by leaf, what of it is
    trained, what is promised of privacy, and hiso_jax's version. JAX's version is none of it:
    other versions reach the same bits, and where one does not, the digest says so.

    Args:
      header: as a `hiso_jax.Ledger` has it.

    Example:
      >>> import hiso_jax as hj, jax, jax.numpy as jnp
      >>> alg = hj.decomfl(lambda params, batch: ((params["w"] - batch) ** 2).mean(), 0.1)
      >>> state = alg.init({"w": jnp.zeros(3)}, jax.random.key(0))
      >>> len(identity(hj.ledger.header.describe(alg, state)))
      8
    """
    parts = [header["algorithm"], header["key"], header["base"], header["leaves"]]
    parts += [header["privacy"]] if "privacy" in header else []
    text = headers.canonical({"run": parts, "version": header["software"]["hiso-jax"]})
    return hashlib.sha256(text.encode()).digest()[:8]


def pack(message: Message, run: bytes) -> bytes:
    """Bytes of a message.

    Args:
      message: one of those above.
      run: from `identity`.
    """
    kind = _KINDS.index(type(message))
    return _HEAD.pack(b"hj", VERSION, kind, run, message.round) + _body(message)


def _body(message: Message) -> bytes:
    if isinstance(message, Ask):
        flags = (RATES * (message.rates is not None) | LAST * message.last
                 | SNAPSHOT * (message.snapshot is not None) | RESET * message.reset)  # fmt: skip
        body = message.snapshot
        if body is None:
            rates = () if message.rates is None else message.rates
            body = _floats(message.records) + _floats(rates)
        fixed = (message.first, len(message.records), message.slot, flags)
        return _ASK.pack(*fixed, _digest(message.digest)) + body
    if isinstance(message, Reply):
        scalars = b"" if message.scalars is None else _floats(message.scalars)
        return _digest(message.digest) + scalars
    if isinstance(message, Behind):
        return _BEHIND.pack(message.held, _digest(message.digest))
    if isinstance(message, Step):
        return b"".join(len(part).to_bytes(4, "little") + part for part in message.parts)
    if isinstance(message, Apart):
        return _APART.pack(message.first) + np.asarray(message.digests, "<u4").tobytes()
    if isinstance(message, Other):
        return zlib.compress(headers.canonical(message.header).encode())
    texts = (message.kind, message.blames) if message.blames else (message.kind,)
    return b"\n".join(text.encode()[:200] for text in texts)


def parse(content: Any, run: bytes, sent: tuple[int, int], record: tuple[int, int]) -> Message:
    """The message that bytes are.

    Args:
      content: what came; anything.
      run: from `identity`.
      sent: (K, P) of what a client sends.
      record: (K, S) of a record.

    Raises:
      WireError: it is none, or of another run; says what was wanted.
    """
    if not isinstance(content, (bytes, bytearray)) or len(content) < _HEAD.size:
        size = f"{len(content)} bytes" if isinstance(content, (bytes, bytearray)) else type(content)
        raise WireError(f"message: expected at least {_HEAD.size} bytes, got {size}")
    content = bytes(content)
    mark, version, number, other, round = _HEAD.unpack_from(content)
    if mark != b"hj" or number >= len(_KINDS):
        raise WireError("message: not one of hiso_jax")
    if version != VERSION:
        raise WireError(f"message: expected version {VERSION} of the messages, got {version}")
    kind, body = _KINDS[number], content[_HEAD.size :]
    if other != run and kind is not Other and kind is not Ask:
        raise WireError(f"message: it is of run {other.hex()}, expected {run.hex()}")
    if kind is Ask:
        return _parse_ask(round, body, record)
    if kind is Other:
        return Other(round, _inflate(body))
    if kind is Failed:
        if len(body) > 401:
            raise WireError(f"message: expected at most 401 bytes of text, got {len(body)}")
        error, _, blames = body.decode("utf-8", "replace").partition("\n")
        return Failed(round, error, blames)
    if kind is Step:
        return Step(round, _parse_step(body))
    if kind is Apart:
        count, rest = divmod(len(body) - _APART.size, 8)
        if rest or not 0 < count <= MOST_ROUNDS:
            raise WireError(f"message: expected digests of 8 bytes, got {len(body)} bytes")
        found = np.frombuffer(body, "<u4", offset=_APART.size).astype(np.uint32)
        return Apart(round, _APART.unpack_from(body)[0], found.reshape(-1, 2))
    if kind is Behind:
        _sized(body, {_BEHIND.size})
        held, digest = _BEHIND.unpack(body)
        return Behind(round, held, np.frombuffer(digest, "<u4").astype(np.uint32))
    _sized(body, {8, 8 + 4 * sent[0] * sent[1]})
    scalars = np.frombuffer(body, "<f4", offset=8).reshape(-1, *sent[1:])
    found = np.frombuffer(body, "<u4", 2).astype(np.uint32)
    return Reply(round, found, scalars if scalars.size else None)


def _sized(body: bytes, sizes: set[int]) -> None:
    if len(body) not in sizes:
        raise WireError(f"message: expected {max(sizes)} bytes after its head, got {len(body)}")


def _parse_ask(round: int, body: bytes, record: tuple[int, int]) -> Ask:
    if len(body) < _ASK.size:
        raise WireError(f"message: expected at least {_ASK.size} bytes to ask, got {len(body)}")
    first, count, slot, flags, digest = _ASK.unpack_from(body)
    rest = body[_ASK.size :]
    found = np.frombuffer(digest, "<u4").astype(np.uint32)
    each = record[0] * record[1]
    size = 4 * count * (each + bool(flags & RATES))
    if count > MOST_ROUNDS or (not flags & SNAPSHOT and len(rest) != size):
        raise WireError(f"message: expected {size} bytes of {count} records, got {len(rest)}")
    ask = Ask(round, found, first, np.zeros((0, *record), np.float32), None, slot,
              bool(flags & LAST), bool(flags & RESET))  # fmt: skip
    if flags & SNAPSHOT:
        return ask._replace(snapshot=rest)
    numbers = np.frombuffer(rest, "<f4").astype(np.float32)
    records = numbers[: count * each].reshape(count, *record)
    return ask._replace(records=records, rates=numbers[count * each :] if flags & RATES else None)


def _parse_step(body: bytes) -> tuple[bytes, ...]:
    if len(body) > MOST_STEP:
        raise WireError(f"message: expected at most {MOST_STEP} bytes of a step, got {len(body)}")
    parts, at = [], 0
    while at < len(body):
        if len(parts) == MOST_PARTS:
            raise WireError(f"message: a step of more than {MOST_PARTS} parts")
        size = int.from_bytes(body[at : at + 4], "little")
        parts.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(body):
        raise WireError(f"message: a step of {len(body)} bytes is cut off")
    return tuple(parts)


def _inflate(body: bytes) -> dict[str, Any]:
    if len(body) > MOST_TEXT:
        raise WireError(f"message: expected at most {MOST_TEXT} bytes of a header, got {len(body)}")
    try:
        text = zlib.decompressobj().decompress(body, 16 * MOST_TEXT)
        header = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise WireError(f"message: no header: {error}") from None
    if not isinstance(header, dict):
        raise WireError("message: no header")
    return header


def where_apart(message: Apart, rounds: int, text_of: Callable[[int], str]) -> str:
    """The first state of a client that was not the run's, in words.

    Args:
      message: with the digests that its states had.
      rounds: of the run.
      text_of: number of rounds -> digest of the run's state after so many.

    Example:
      >>> where_apart(Apart(9, 3, np.array([[1, 0], [3, 0]])), 9, lambda n: f"{n - 2:016x}")[:34]
      'its state went apart in round 3: t'
    """
    for i, digest in enumerate(message.digests[: max(rounds - message.first + 1, 0)]):
        number = message.first + i
        theirs, ours = digests.text(digest), text_of(number)
        if theirs != ours:
            where = f"in round {number - 1}" if number else "at the base model"
            where += " or before" if number and not i else ""
            return (
                f"its state went apart {where}: the digest after {number} rounds is {theirs} there "
                f"and {ours} here"
            )
    return "it says that its state went apart, and shows digests that are the run's"


def _floats(numbers: Any) -> bytes:
    return np.asarray(numbers, "<f4").tobytes()


def _digest(digest: Any) -> bytes:
    """Eight bytes of a digest uint32 [2], or of its text."""
    words = digests.parse(digest) if isinstance(digest, str) else np.asarray(digest)
    return words.astype("<u4").tobytes()


def run_of(content: bytes) -> bytes | None:
    """The identity that a message names, of any version; None if it does not begin as one."""
    ours = isinstance(content, bytes) and len(content) >= _HEAD.size and content[:2] == b"hj"
    return content[4:12] if ours else None


def round_of(content: bytes) -> int:
    """The round that a message names, of another run, too."""
    return int.from_bytes(content[12:16], "little")
