"""Bytes from others, messages and compact files: as they were written, or else refused."""

import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hiso_jax.federation import wire
from hiso_jax.ledger import compact

RUN = bytes(range(8))
MESSAGES = [
    wire.Ask(7, np.array([1, 2]), 5, np.arange(4, dtype=np.float32).reshape(2, 1, 2), None, 3, True),
    wire.Ask(7, np.array([1, 2]), 5, np.full((2, 1, 2), np.nan), np.ones(2), 0, False, True),
    wire.Ask(7, np.array([1, 2**32 - 1]), 7, np.zeros((0, 1, 2)), None, snapshot=b"all of it"),
    wire.Reply(7, np.array([1, 2]), np.array([[0.5, -2.5]])),
    wire.Reply(7, np.array([1, 2]), None),
    wire.Behind(7, 2**32 - 1, np.array([1, 2])),
    wire.Apart(7, 4, np.arange(6).reshape(3, 2)),
    wire.Other(2**32 - 1, {"a": [1, None, "x"]}),
    wire.Failed(7, "ValueError"),
    wire.Failed(7, "SecureError", "site-2"),
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


def test_a_step_of_many_parts_is_refused_before_they_are_made():
    """Four zeros make a part of nothing: of 64 MiB that would be 16 million."""
    whole = wire.Step(7, (b"",) * wire.MOST_PARTS)
    assert wire.parse(wire.pack(whole, RUN), RUN, (1, 2), (1, 2)) == whole
    for more in (4, wire.MOST_STEP - 4 * wire.MOST_PARTS):
        with pytest.raises(wire.WireError, match="a step of more than 65536 parts"):
            wire.parse(wire.pack(whole, RUN) + bytes(more), RUN, (1, 2), (1, 2))
    with pytest.raises(wire.WireError, match="expected at most 67108864 bytes of a step"):
        wire.parse(
            wire.pack(wire.Step(7, ()), RUN) + bytes(wire.MOST_STEP + 1), RUN, (1, 2), (1, 2)
        )


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_says_its_run_and_round(message: Any):
    """Where a party of another run looks, too, which cannot parse the rest."""
    content = wire.pack(message, RUN)
    assert (wire.run_of(content), wire.round_of(content)) == (RUN, message.round)
    assert wire.run_of(b"no message of hiso_jax at all") is None


@pytest.mark.parametrize("text", [b" " * 2**24, b"[" * 10**6], ids=["long", "deep"])
def test_a_compact_file_s_header_is_read_up_to_a_size(
    text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A few bytes of a file that came from somewhere may unpack to any number."""
    monkeypatch.setattr(compact, "MOST_TEXT", 2**20)
    packed = np.frombuffer(zlib.compress(text), np.uint8)
    save_file({"header": packed, "scalars": np.zeros((1, 1, 1), np.float32)}, tmp_path / "bomb")
    tracemalloc.start()
    with pytest.raises(compact.BadFile):
        compact.read(tmp_path / "bomb")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**23
