"""Noise on integers has exactly its law, and what the accountant says of it bounds what is exact."""

import errno
import math
import os
import resource
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

pytest.importorskip("dp_accounting", reason="needs the extra dp")

from hiso_jax import privacy
from hiso_jax.privacy import noise
from tests.helpers import refuse_with

KEY = bytes(range(32))


@pytest.mark.parametrize("variance", [1, 7, 100])
def test_numbers_have_the_discrete_gaussian_law(variance: int):
    count, reach = 6000, 4 * math.isqrt(variance) + 4
    drawn = Counter(noise.discrete_gaussian(privacy.Bits(KEY, b"law"), variance, count).tolist())
    values = np.arange(-50 * reach, 50 * reach + 1)
    weights = np.exp(-(values.astype(float) ** 2) / (2 * variance))
    chances = dict(zip(values.tolist(), weights / weights.sum(), strict=True))
    cells = [v for v in range(-reach, reach + 1) if count * chances[v] >= 5]
    found = [drawn[v] for v in cells]
    wanted = [count * chances[v] for v in cells]
    rest = count - sum(found), count - sum(wanted)
    if rest[1] >= 1:
        found, wanted = [*found, rest[0]], [*wanted, rest[1]]
    else:
        wanted = list(np.array(wanted) * sum(found) / sum(wanted))
    assert stats.chisquare(found, wanted).pvalue > 1e-4


def test_noise_of_real_size_is_gaussian_and_signs_are_even():
    variance = (5 * 2**20) ** 2
    drawn = noise.discrete_gaussian(privacy.Bits(KEY, b"size"), variance, 4000) / variance**0.5
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    exact = noise.discrete_gaussian(privacy.Bits(KEY, b"size"), variance, 4000)
    assert stats.chisquare(np.bincount(exact % 16, minlength=16)).pvalue > 1e-4  # low bits too


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2**70), st.binary(max_size=8))
def test_uniform_numbers_are_below_and_of_the_secret(limit: int, purpose: bytes):
    draw = lambda key: [privacy.Bits(key, purpose).below(limit) for _ in range(3)]  # noqa: E731
    assert draw(KEY) == draw(KEY) and all(0 <= x < limit for x in draw(KEY))
    other = privacy.Bits(KEY[::-1], purpose)
    assert limit < 2**60 or other.below(limit) != draw(KEY)[0]


def test_uniform_numbers_are_uniform():
    bits = privacy.Bits(KEY, b"uniform")
    counts = np.bincount([bits.below(11) for _ in range(5500)], minlength=11)
    assert stats.chisquare(counts).pvalue > 1e-4 and len(counts) == 11


def test_a_secret_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path):
    path = tmp_path / "secret"
    first = privacy.secret(path)
    assert len(first) == 32 and privacy.secret(path) == first
    assert os.stat(path).st_mode & 0o077 == 0
    assert privacy.secret(tmp_path / "other") != first
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match=f"path: {path}: expected a secret .* 32 .*got 5 bytes"):
        privacy.secret(path)
    assert len({privacy.of_run(first, run) for run in ("one", "other", "")} | {first}) == 4
    assert privacy.of_run(first, "one") == privacy.of_run(first, "one")


@pytest.mark.parametrize("call", ["write", "fsync", "links", None])
def test_a_first_start_that_fails_or_is_not_alone_leaves_a_whole_secret_or_none(
    call: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A full disk, a mount without links, and many processes that begin at once."""
    path, found = tmp_path / "secret", set[bytes]()
    with monkeypatch.context() as patch:
        if call == "fsync":
            patch.setattr(os, "fsync", refuse_with(errno.ENOSPC))
        elif call == "links":
            patch.setattr(os, "link", refuse_with(errno.EPERM))
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if call == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (9, limit[1]))
        try:
            if call in ("write", "fsync"):
                with pytest.raises(OSError):
                    privacy.secret(path)
                assert list(tmp_path.iterdir()) == []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if call == "links":
            found = {privacy.secret(path)}
    with ThreadPoolExecutor(8) as pool:
        found |= set(pool.map(lambda _: privacy.secret(path), range(32)))
    assert len(found) == 1 and list(tmp_path.iterdir()) == [path]
    assert os.stat(path).st_mode & 0o077 == 0


TERMS = privacy.Terms.of(privacy.distributed(1.5, 3.0, clients=4, least=4))


def test_noise_depends_on_secret_round_client_and_what_it_hides():
    def sent(scalars: Any = ((0.5, 0.5),), **given: Any) -> bytes:
        return TERMS.contribute(
            scalars, **(dict(client="ann", round=0, secret=KEY) | given)
        ).tobytes()

    others = [dict(round=1), dict(client="bob"), dict(secret=KEY[::-1]),
              dict(scalars=((0.5, 0.4999),))]  # fmt: skip
    assert sent() == sent()
    assert len({sent(), *(sent(**other) for other in others)}) == 5
    with pytest.raises(ValueError, match="secret: expected .* got NoneType"):
        sent(secret=None)
    with pytest.raises(ValueError, match="weight: client 'ann'"):
        sent(weight=2)
    with pytest.raises(ValueError, match="client 'ann': expected finite"):
        sent(((np.nan, 0.0),))


@pytest.mark.parametrize("kind", ["central", "distributed", "local"])
def test_the_noise_of_a_sum_has_the_size_that_its_event_says(kind: str):
    """Standard deviation over sensitivity, with as many clients as are needed."""
    clients = 4
    more: Any = dict(least=clients) if kind == "distributed" else {}
    mechanism = getattr(privacy, kind)(1.5, 3.0, clients=clients, **more)
    terms = privacy.Terms.of(mechanism)
    zeros, sums = np.zeros((20, 20)), []
    names = ["ann"] if kind == "local" else [f"{i}" for i in range(clients)]
    own = [terms.contribute(zeros, client=n, round=0, secret=KEY) for n in names]
    sums = terms.release(terms.grid.add(own), round=0, secret=KEY)[:-1] * terms.grid.step
    sensitivity = 1.5 * (2 if kind == "local" else 1)
    assert np.std(sums) == pytest.approx(mechanism.event["noise"] * sensitivity, rel=0.12)
    assert stats.kstest(sums / (3.0 * 1.5), "norm").pvalue > 1e-4


@pytest.mark.parametrize("given, text", [
    (dict(kind="central", clip=1.0, noise_multiplier=2.0, masked=True), "masked: a central"),
    (dict(kind="distributed", clip=1.0, noise_multiplier=2.0, least=3), "masked: a distributed"),
    (dict(kind="distributed", clip=1.0, noise_multiplier=2.0, rate=0.1), "rate: a secret draw"),
    (dict(kind="central", clip=1.0, noise_multiplier=1e-6), "step: the noise of one party"),
    (dict(kind="central", clip=1.0, noise_multiplier=0), "noise_multiplier: .*> 0.*got 0"),
    (dict(kind="none", clip=1.0, noise_multiplier=1.0), "kind: expected one of"),
    (dict(kind="central", clip=9.0, noise_multiplier=1.0, bound=8.0), "clip: .*grid's bound 8"),
    (dict(kind="central", clip=1.0, noise_multiplier=1.0, max_weight=2), "max_weight: .*got 2"),
    (dict(kind=None, epsilon=1.0), "epsilon: a budget needs a mechanism"),
])  # fmt: skip
def test_terms_that_promise_nothing_are_refused(given: dict[str, Any], text: str):
    given = given.copy()
    take = lambda *names: {k: given.pop(k) for k in names if k in given}  # noqa: E731
    grid, rest = {"bound": 100.0} | take("bound", "max_weight"), take("masked", "epsilon")
    with pytest.raises(ValueError, match=text):
        mechanism = privacy.Mechanism(clients=5, **given) if given["kind"] else None
        privacy.Terms(privacy.Grid(**grid), mechanism, **rest)


@pytest.mark.parametrize("clients, asked, rounds, participation, epsilon, wanted", [
    (1000, 50, 300, "poisson", 8.0, 0.90), (1000, 50, 300, "known", 8.0, 2.5),
    (40, 20, 200, "known", 4.0, 11.6), (100, 10, 1000, "known", 2.0, 21.5),
])  # fmt: skip
def test_noise_for_an_epsilon_is_the_smallest_that_keeps_it(
    clients: int, asked: int, rounds: int, participation: str, epsilon: float, wanted: float
):
    """The figures are those of dp-accounting's own calibration."""
    given: Any = dict(rounds=rounds, clients=clients, asked=asked, participation=participation)
    found = privacy.calibrate(epsilon, **given)
    assert found == pytest.approx(wanted, rel=0.02)
    poisson = participation == "poisson"
    count, rate = (rounds, asked / clients) if poisson else (rounds * asked // clients, 1.0)
    spent = [privacy.epsilon_of({(x, rate): count}, 1e-5) for x in (found, found * 0.99)]
    assert spent[0] <= epsilon < spent[1]


def test_epsilon_bounds_the_exact_one_and_grows():
    """Of T Gaussian rounds together, by Balle and Wang 2018, Theorem 8."""
    for noise_, rounds in ((2.0, 1), (8.0, 30)):
        mean = rounds**0.5 / noise_
        found = privacy.epsilon_of({(noise_, 1.0): rounds}, 1e-5)

        def exact(epsilon: float, mean: float = mean) -> float:
            a, b = mean / 2, epsilon / mean
            return float(stats.norm.cdf(a - b) - np.exp(epsilon) * stats.norm.cdf(-a - b))

        assert exact(found) <= 1e-5 < exact(0.8 * found)


def test_a_client_answers_for_its_own_rounds_only():
    event = {"noise": 8.0, "participation": "known"}
    turns = [["ann", "bob"], ["ann"], ["cem"], None, ["ann", "cem"]]
    events = [None if names is None else event for names in turns]
    accountant = privacy.Accountant.of(events, [names or [] for names in turns])
    assert accountant.most == ["ann"]
    assert accountant.epsilon() == privacy.epsilon_of({(8.0, 1.0): 3}, 1e-5)
    assert accountant.epsilon(event, ["cem"]) == accountant.epsilon()
    assert accountant.epsilon(event, ["ann"]) == privacy.epsilon_of({(8.0, 1.0): 4}, 1e-5)
    assert accountant.epsilon() == privacy.epsilon_of({(8.0, 1.0): 3}, 1e-5)  # only asked
    assert privacy.Accountant().epsilon() == 0.0


@pytest.mark.parametrize("event", [
    {}, {"noise": 1.0}, {"noise": 1.0, "participation": "known", "rate": 0.1},
    {"noise": -1.0, "participation": "known"}, {"noise": 1.0, "participation": "poisson", "rate": 2},
])  # fmt: skip
def test_events_that_nobody_wrote_are_refused(event: Any):
    with pytest.raises(ValueError, match="event"):
        privacy.Accountant().spend(event, ["ann"])


@pytest.mark.parametrize("given, text", [
    (dict(epsilon=0.0), "epsilon: .*> 0"), (dict(delta=2.0), "delta: .*got 2"),
    (dict(asked=50), "asked: expected at most clients=10, got 50"),
    (dict(participation="secret"), "participation: expected one of"),
    (dict(participation="poisson", own_rounds=3), "own_rounds: nobody knows them"),
    (dict(rounds=0), "rounds: expected an int >= 1"),
])  # fmt: skip
def test_what_cannot_be_calibrated_is_refused(given: dict[str, Any], text: str):
    with pytest.raises(ValueError, match=text):
        privacy.calibrate(**(dict(epsilon=1.0, rounds=5, clients=10, asked=5) | given))
