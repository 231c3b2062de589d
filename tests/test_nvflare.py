"""A run of real processes on loopback: one server, three sites, mutual TLS, and what befalls them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import federation
from tests import parties
from tests.parties import NAMES

pytest.importorskip("nvflare", reason="the engine is the extra hiso-jax[nvflare]")

from tests.flare import Flare  # noqa: E402


@pytest.fixture
def flare(tmp_path: Path) -> Any:
    with Flare(tmp_path, NAMES) as found:
        found.start()
        found.wait()
        yield found


def simulated(rounds: int, count: int = 3) -> hj.Ledger:
    """The ledger of a simulation with the same clients and batches."""
    alg = parties.algorithm()
    ledger = hj.Ledger.create(":memory:", alg, parties.begin(alg))
    reports = federation.run(
        alg, parties.begin(alg), parties.everybody(), rounds=rounds, clients_per_round=count,
        batch_size=parties.BATCH, prepare=parties.one,
    )  # fmt: skip
    for report in reports:
        ledger.append(report.metrics.record, hj.digest(report.state), None, report.reported)
    return ledger


def assert_same_run(flare: Flare, wanted: hj.Ledger, name: str = "hiso") -> None:
    """Records, digests and who reported are the same; all sites hold the model."""
    with hj.Ledger.open(flare.kept("server", name) / "ledger.sqlite", read_only=True) as ledger:
        ours, theirs = ledger.records(), wanted.records()
        assert ours.scalars.tobytes() == theirs.scalars.tobytes()
        assert (ours.digests, ours.reported) == (theirs.digests, theirs.reported)
        assert ledger.header == wanted.header
    assert {name: flare.result(name)["digest"] for name in NAMES} == dict.fromkeys(
        NAMES, theirs.digests[-1]
    )


def test_three_sites_and_a_simulation_write_one_ledger(flare: Flare):
    """Two of three take part in a round; who was away ends with the others."""
    rounds, count = 5, 2
    assert (
        flare.finish(flare.submit(rounds=rounds, clients_per_round=count)) == "FINISHED:COMPLETED"
    )
    wanted = simulated(rounds, count)
    assert_same_run(flare, wanted)
    result, rows = flare.result(), flare.rows()
    assert result["held_by"] == NAMES and result["not_there"] == {}
    assert [row["round"] for row in rows] == list(range(rounds))
    assert all(row["faults"] == {} and row["silent"] == [] for row in rows)
    up = sum(count["payload_up"] for count in result["bytes"].values())
    down = sum(count["payload_down"] for count in result["bytes"].values())
    assert (up, down) == (rounds * count * (8 + 8), 3 * rounds * 8)
    assert rows[-1]["wire_sent"] > down and rows[-1]["wire_received"] > up
    compact = hj.Ledger.import_(flare.kept("server") / "ledger.safetensors")
    np.testing.assert_array_equal(compact.records().scalars, wanted.records().scalars)
