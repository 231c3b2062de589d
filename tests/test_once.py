"""A vector is given once a round, noise is drawn once a run: also by two processes, and two runs."""

import contextlib
import dataclasses
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")
pytest.importorskip("dp_accounting", reason="needs the extra dp")

import hiso_jax as hj
from hiso_jax import privacy, secure
from hiso_jax.federation import private
from tests import parties
from tests import test_masked_sites as sites
from tests import test_private_rounds as rounds
from tests.test_masked_sites import NAMES, NOISY, TERMS, Net


@pytest.mark.parametrize("terms", [TERMS, NOISY], ids=["exact", "noise"])
def test_a_vector_is_given_once_also_by_two_processes_at_a_time(
    terms: privacy.Terms, tmp_path: Path
):
    """The difference of their sums would be what site-3 gave."""
    one, other = (Net(terms, tmp_path, threshold=2) for _ in range(2))
    assert one.round().reported == dict.fromkeys(NAMES, 1.0)
    other.lost = lambda name, step: name == "site-3"
    closed = other.round()
    assert closed.reported == {} and np.isnan(closed.record).all()
    assert {why.split()[0] for why in closed.faults.values()} == {"SecureError"}


@settings(max_examples=25, deadline=None)
@given(takes=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(0, 5))))
def test_journals_of_one_file_are_one_journal(takes: list[tuple[int, str, int]]):
    """Whoever takes, a run's rounds only go up, and the file says the last."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        journals, last = [secure.Journal(path) for _ in range(3)], dict[str, int]()
        for which, run, round in takes:
            if round > last.get(run, -1):
                journals[which].take(run, round)
                last[run] = round
            else:
                with pytest.raises(secure.SecureError, match=f"for round {last[run]} before"):
                    journals[which].take(run, round)
            assert {*path.read_text().splitlines()} == {f"{n} {r}" for r, n in last.items()}


def test_of_many_who_take_a_round_at_once_one_has_it(tmp_path: Path):
    numbers, many = range(40), 4
    begun = threading.Barrier(many)

    def take(_: int) -> list[int]:
        journal, mine = secure.Journal(tmp_path / "journal"), list[int]()
        begun.wait()
        for round in numbers:
            with contextlib.suppress(secure.SecureError):
                journal.take("run", round)
                mine.append(round)
        return mine

    with ThreadPoolExecutor(many) as pool:
        taken = [round for mine in pool.map(take, range(many)) for round in mine]
    assert len(taken) == len(set(taken)) and max(taken) == numbers[-1]
    journal = secure.Journal(tmp_path / "journal")
    (tmp_path / "journal").unlink()  # what has been given is not forgotten
    with pytest.raises(secure.SecureError):
        journal.take("run", numbers[-1])


def test_two_runs_that_measure_the_same_have_two_noises(monkeypatch: pytest.MonkeyPatch):
    """Of one secret, as under one name: else what they differ in has little noise, or none."""
    nets = []
    for rate in (0.05, 0.06):
        own = hj.federated_hiso(parties.quadratic_loss, rate, num_perturbations=2)
        monkeypatch.setattr(sites, "ALGORITHM", own)
        nets.append(Net(NOISY, threshold=2))
    records = [net.round().record for net in nets]
    for name in NAMES:
        one, other = (net.sites[name]._masks for net in nets)
        np.testing.assert_array_equal(one._kept[1], other._kept[1])
        assert one._secret == other._secret and one.run != other.run
    assert np.abs(records[0] - records[1]).min() > 1e-3
    again = Net(NOISY, threshold=2)  # the same run once more has the same
    np.testing.assert_array_equal(again.round().record, records[1])


def test_two_ledgers_of_one_secret_have_two_noises_and_two_draws():
    """Else equal records would say that the sums are equal, whoever was in one of them only."""
    drawing = dataclasses.replace(rounds.CENTRAL.mechanism, rate=0.5)
    terms = dataclasses.replace(rounds.CENTRAL, mechanism=drawing, epsilon=None)
    for own in (rounds.CENTRAL, terms):
        hosts = [
            private.PrivateServer(
                rounds.ALGORITHM, rounds.fresh(),
                hj.Ledger.create(":memory:", rounds.ALGORITHM, rounds.fresh(), {"of": of}, own.config),
                secret=rounds.SECRET,
            )
            for of in "aba"
        ]  # fmt: skip
        if own is rounds.CENTRAL:
            for host in hosts:
                rounds.answer_all(host)
            one, other, again = (host.close() for host in hosts)
            assert np.abs(one - other).min() > 1e-6
            np.testing.assert_array_equal(one, again)
        else:
            everybody = [f"{i}" for i in range(64)]
            one, other, again = (host.open_drawn(everybody) for host in hosts)
            assert one != other and one == again
