"""Sites that say what no site says, or too often: they are named, and the others' round goes on."""

from typing import Any

import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.federation import wire
from tests.test_sites import NAMES, RUN, Net, sites


def test_a_client_that_says_again_and_again_that_it_is_behind_is_named():
    """Each time costs the records that it missed, or a model; with true digests, which all know."""
    net = Net(sites())
    states = [np.asarray(hj.digest(net.server.state))]
    for _ in range(2):
        net.round()
        states.append(np.asarray(hj.digest(net.server.state)))
    host, sent = net.host, []
    net.server.open(NAMES)
    host._begin(NAMES, last=False)
    host._send = lambda name, message: sent.append(message)
    for i in range(20):
        host.receive("site-2", wire.pack(wire.Behind(i % 2, states[i % 2]), RUN))
    assert len(sent) == federation.host.CATCH_UPS
    assert host.faults == {"site-2": "it has been behind 3 times in this round"}


def test_whatever_a_client_makes_fail_is_its_own_fault(monkeypatch: pytest.MonkeyPatch):
    net = Net(sites())

    def broken(*args: Any) -> None:
        raise KeyError("secret")

    real = federation.host.Host._measured
    monkeypatch.setattr(federation.host.Host, "_measured", lambda self, name, message: (
        broken() if name == "site-2" else real(self, name, message)))  # fmt: skip
    closed = net.round()
    assert closed.faults == {"site-2": "its message cannot be taken: KeyError"}
    assert set(closed.reported) == {"site-1", "site-3"}
