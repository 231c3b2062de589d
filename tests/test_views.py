"""What a server and up to t - 1 clients see does not depend on the others' vectors but by their sum.

Streams of unknown keys are random, so the argument is one about messages: everything but the masked
vectors is the same whatever the vectors are, and for any two lists of vectors with the same sum
there are pads that make the very same masked vectors. It is checked on the messages themselves, of
both lists, with pads that are shifted along a path through the honest clients.
"""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")

from hiso_jax import secure
from hiso_jax.secure import client, pads, primitives, server

NAMES = tuple("abcdef")
SITES = {name: name.encode() * 32 for name in NAMES}
DIRECTORY = {name: primitives.site_public(key) for name, key in SITES.items()}
LENGTH, THRESHOLD = 2, 4


class World:
    """One round, with all its randomness from a seed, and all its messages."""

    def __init__(
        self, seed: int, vectors: Any, gone: set[str], shift: Any = None, late: bool = False
    ):
        rng = random.Random(seed)
        split, draws = primitives.split, rng.randbytes
        self.opened: list[tuple[str, str]] = []  # what the server has made of shares
        self.session = secure.Session("run", 0, NAMES, LENGTH, THRESHOLD, None, THRESHOLD)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(primitives, "split", lambda t, n, s: deterministic(split, t, n, s, rng))
            if shift:
                pair = pads.pair
                shifted = lambda session, name, key, other, public: (  # noqa: E731
                    pair(session, name, key, other, public) + shift(name, other)
                )
                patch.setattr(client.pads, "pair", shifted)
            self.play(draws, vectors, gone, late)

    def play(self, draws: Any, vectors: Any, gone: set[str], late: bool) -> None:
        self.host = server.Server(self.session, DIRECTORY)
        self.clients = {
            n: secure.Client(self.session, n, SITES[n], DIRECTORY, random=draws) for n in NAMES
        }
        self.messages: dict[tuple[bytes, str], bytes] = {}
        replies: Any = dict.fromkeys(NAMES)
        for kind in (b"K", b"S", b"M", b"R"):
            for name in replies:
                if kind == b"M" and name in gone and not late:
                    continue
                one = self.clients[name]
                message = {b"K": lambda m, one=one: one.advertise(),
                           b"S": one.share, b"R": one.unmask,
                           b"M": lambda m, one=one: one.mask(m, vectors[one.name])}[kind](replies[name])  # fmt: skip
                self.messages[kind, name] = message
                if not (kind == b"M" and name in gone):
                    self.host.receive(name, message)
            if kind != b"R":
                replies = self.host.close()


def deterministic(split: Any, threshold: int, count: int, secret: bytes, rng: random.Random) -> Any:
    """Shamir's shares with the coefficients from `rng`; the library's own are from the system."""
    from Crypto.Protocol import SecretSharing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecretSharing, "rng", rng.randbytes)
        return split(threshold, count, secret)


def signed(name: str, other: str, number: np.ndarray) -> np.ndarray:
    return number if name < other else np.zeros_like(number) - number


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sets(st.sampled_from(NAMES), max_size=2), st.data())
def test_another_list_with_the_same_sum_has_the_same_messages(seed: int, gone: set[str], data: Any):
    left = [name for name in NAMES if name not in gone]
    bad = data.draw(st.sets(st.sampled_from(NAMES), max_size=THRESHOLD - 1))
    honest = [name for name in left if name not in bad]
    rng = np.random.default_rng(seed)
    draw = lambda: {n: rng.integers(-(2**50), 2**50, LENGTH) for n in NAMES}  # noqa: E731
    first, second = draw(), draw()
    for name in bad:
        second[name] = first[name]
    if honest:
        second[honest[-1]] += sum(first[n] for n in honest) - sum(second[n] for n in honest)
    # Along the path, each pad takes over what the vectors before it differ by.
    moved, so_far = {}, np.zeros(LENGTH, np.uint64)
    for one, two in itertools.pairwise(honest):
        so_far = so_far + (first[one] - second[one]).astype(np.uint64)
        moved[frozenset((one, two))] = signed(one, two, so_far)

    def shift(name: str, other: str) -> np.ndarray:
        by = moved.get(frozenset((name, other)), np.zeros(LENGTH, np.uint64))
        return signed(name, other, by)

    one, two = World(seed, first, gone), World(seed, second, gone, shift)
    assert one.messages == two.messages
    np.testing.assert_array_equal(one.host.total()[0], sum(first[n] for n in left))
    np.testing.assert_array_equal(two.host.total()[0], sum(first[n] for n in left))
    # Without the shift, only the masked vectors of the honest differ.
    plain = World(seed, second, gone)
    differ = {key for key in one.messages if one.messages[key] != plain.messages[key]}
    assert differ <= {(b"M", name) for name in honest}
    assert len(honest) < 2 or any((first[n] != second[n]).any() for n in honest) == bool(differ)


def shares_known(world: World, bad: set[str], owner: str, kind: bytes) -> int:
    """How many shares of a secret a server and the clients `bad` have in the end."""
    known = {name for name in bad if kind in world.clients[name]._held.get(owner, {})}
    for name in NAMES:
        message = world.messages.get((b"R", name))
        if message is not None and world.clients[name]._held[owner][kind] in message:
            known.add(name)
    return len(known)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sets(st.sampled_from(NAMES), max_size=2), st.data())
def test_too_few_shares_of_what_hides_the_honest(seed: int, gone: set[str], data: Any):
    """The pads that were shifted above are streams of keys that nobody else can make."""
    bad = data.draw(st.sets(st.sampled_from(NAMES), max_size=THRESHOLD - 1))
    world = World(seed, {n: np.arange(LENGTH) for n in NAMES}, gone, late=True)
    for name in set(NAMES) - bad:
        if name in gone:
            # Its vector came late: its pads are open, its own mask is not.
            assert shares_known(world, bad, name, b"pads") >= THRESHOLD
            assert shares_known(world, bad, name, b"own") < THRESHOLD
        else:
            assert shares_known(world, bad, name, b"pads") < THRESHOLD
            assert shares_known(world, bad, name, b"own") >= THRESHOLD


def test_a_late_vector_is_still_hidden_from_the_server():
    """All that a server has computed takes the pads off, and what is left is under a stream."""
    vectors = {n: np.full(LENGTH, 5) for n in NAMES}
    world = World(3, vectors, {"c"}, late=True)
    assert not world.host.receive("c", world.messages[b"M", "c"])
    host, session = world.host, world.session
    key = pads.private(session, "c", host._combine("c"))
    late = np.frombuffer(world.messages[b"M", "c"][-8 * LENGTH :], "<u8").astype(np.uint64)
    for other in session.neighbors("c"):
        late = late - pads.pair(session, "c", key, other, host._keys[other].pads)
    own = pads.own(session, "c", world.clients["c"]._seeds[b"own"])
    np.testing.assert_array_equal(late - own, vectors["c"])  # nothing else is on it
    assert (late != vectors["c"]).all()
