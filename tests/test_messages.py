"""Bytes between host and sites: messages come back as they were, and anything else is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiso_jax.federation import wire

RUN = bytes(range(8))
MESSAGES = [
    wire.Ask(7, np.array([1, 2]), 5, np.arange(4, dtype=np.float32).reshape(2, 1, 2), None, 3, True),
    wire.Ask(7, np.array([1, 2]), 5, np.full((2, 1, 2), np.nan), np.ones(2), 0, False, True),
    wire.Ask(7, np.array([1, 2**32 - 1]), 7, np.zeros((0, 1, 2)), None, snapshot=b"all of it"),
    wire.Reply(7, np.array([1, 2]), np.array([[0.5, -2.5]])),
    wire.Reply(7, np.array([1, 2]), None),
    wire.Behind(2**32 - 1, np.array([1, 2])),
    wire.Apart(4, np.arange(6).reshape(3, 2)),
    wire.Other({"a": [1, None, "x"]}),
    wire.Failed("ValueError"),
    wire.Step(7, (b"K", b"", bytes(40))),
]  # fmt: skip


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_back_as_they_were(message: Any):
    content = wire.pack(message, RUN)
    again = wire.parse(content, RUN, (1, 2), (1, 2))
    assert type(again) is type(message)
    for field, value in message._asdict().items():
        np.testing.assert_array_equal(getattr(again, field), value)
    assert wire.pack(again, RUN) == content


@given(st.sampled_from(MESSAGES), st.data())
@settings(max_examples=300)
def test_bytes_are_a_message_or_refused(message: Any, data: Any):
    """Cut, lengthened or with other bytes in it: parsed to what packs to it again, or `WireError`."""
    content = bytearray(wire.pack(message, RUN))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(1, len(content)))])
    content += data.draw(st.binary(max_size=9))
    try:
        parsed = wire.parse(content, RUN, (1, 2), (1, 2))
    except wire.WireError:
        return
    if not isinstance(parsed, wire.Other | wire.Failed | wire.Ask):
        assert wire.pack(parsed, RUN)[12:] == content[12:]
