"""Servers of sums: exact, masked, with noise; what a crash, a retry and an audit find."""

import dataclasses
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("cryptography", reason="needs the extra secure")
pytest.importorskip("Crypto", reason="needs the extra secure")
pytest.importorskip("dp_accounting", reason="needs the extra dp")

import hiso_jax as hj
from hiso_jax import federation, privacy, secure
from hiso_jax.federation import private, server
from tests.helpers import assert_same_bits, quadratic_loss

NAMES = ["ann", "bob", "cem", "dia", "eve"]
SITES = {name: name.encode().ljust(32) for name in NAMES}
DIRECTORY = {name: secure.site_public(key) for name, key in SITES.items()}
SECRET = bytes(range(32))
ALGORITHM = hj.decomfl(quadratic_loss, 0.05, num_perturbations=3)
CENTRAL = privacy.Terms.of(privacy.central(2.0, 4.0, clients=5), epsilon=2.0)
DISTRIBUTED = privacy.Terms.of(privacy.distributed(2.0, 4.0, clients=5, least=3))


def fresh() -> hj.State:
    return ALGORITHM.init({"w": jnp.ones(33)}, jax.random.key(4))


def started(path: Any, terms: privacy.Terms, **given: Any) -> private.PrivateServer:
    ledger = hj.Ledger.create(path, ALGORITHM, fresh(), privacy=terms.config)
    return private.PrivateServer(ALGORITHM, fresh(), ledger, **given)


def scalars_of(name: str, round: int = 0) -> np.ndarray:
    rng = np.random.default_rng([round, *name.encode()])
    return rng.normal(size=(1, 3)).astype(np.float32)


def asked_to_reveal(
    host: private.PrivateServer, names: list[str], threshold: int = 0
) -> tuple[secure.Server, dict[str, secure.Client], dict[str, bytes]]:
    """A round through the masks up to the last question, of those whose vectors come."""
    number = host.open(NAMES)
    session = host.mask(threshold)
    parties = {n: secure.Client(session.session, n, SITES[n], DIRECTORY) for n in NAMES}
    for name, party in parties.items():
        session.receive(name, party.advertise())
    for name, keys in session.close().items():
        session.receive(name, parties[name].share(keys))
    for name, shares in session.close().items():
        vector = host.terms.contribute(
            scalars_of(name), client=name, round=number, secret=SECRET + name.encode()
        )
        if name in names:
            session.receive(name, parties[name].mask(shares, vector))
    return session, parties, session.close()


def masked_round(host: private.PrivateServer, names: list[str], threshold: int = 0) -> np.ndarray:
    """A round through the masks, of those whose vectors come."""
    try:
        session, parties, requests = asked_to_reveal(host, names, threshold)
    except secure.TooFew:
        return host.close()
    for name, request in requests.items():
        session.receive(name, parties[name].unmask(request))
    return host.close()


def test_records_do_not_depend_on_the_order_of_arrival_or_on_masks(tmp_path: Path):
    """Nor on who knows the replies: plain, masked and simulated rounds have the same bits."""
    found = []
    for order in (NAMES[:4], NAMES[3::-1]):
        host = started(":memory:", privacy.Terms())
        number = host.open(order + ["eve"])
        for name in order:
            assert host.reply(name, number, scalars_of(name))
            assert not host.reply(name, number, scalars_of(name))
        found.append((host.close(), host.state))
    host = started(":memory:", privacy.Terms(masked=True), directory=DIRECTORY)
    with pytest.raises(ValueError, match="client 'ann': replies of this run are masked"):
        number = host.open(NAMES)
        host.reply("ann", number, scalars_of("ann"))
    host.close()
    assert host.ledger.records().reported == [{}]  # void: nobody had a session
    record = masked_round(host, NAMES[:4])
    np.testing.assert_array_equal(record, found[0][0])
    assert host.ledger.records().reported[1] == dict.fromkeys(NAMES[:4], 1.0)
    assert_same_bits(*found)
    simulated = private.Simulated(privacy.Terms(masked=True), SECRET, "run")
    scalars = np.stack([scalars_of(name) for name in NAMES])
    summed = simulated(0, NAMES, scalars, np.array([1, 1, 1, 1, 0]))
    np.testing.assert_array_equal(summed.record, record)
    plain = ALGORITHM.aggregate(scalars[:4])
    np.testing.assert_allclose(record, plain, atol=2.0**-20)


def test_below_the_threshold_a_masked_round_is_void():
    host = started(":memory:", privacy.Terms(masked=True), directory=DIRECTORY)
    before = host.state.params
    assert np.isnan(masked_round(host, NAMES[:3])).all()  # of five, four are needed
    assert_same_bits(host.state.params, before)
    assert host.ledger.events() == [None] and host.round == 1
    simulated = private.Simulated(privacy.Terms(masked=True), SECRET, "run")
    scalars = np.zeros((5, 1, 3))
    assert np.isnan(simulated(0, NAMES, scalars, np.array([1, 1, 1, 0, 0])).record).all()


def test_weights_travel_as_one_more_integer():
    grid = privacy.Grid(max_weight=9)
    host = started(":memory:", privacy.Terms(grid))
    number = host.open(["ann", "bob"])
    assert host.reply("ann", number, scalars_of("ann"), 3)
    with pytest.raises(ValueError, match="weight: client 'bob': .*1 to 9 .*got 10"):
        host.reply("bob", number, scalars_of("bob"), 10)
    wide = grid.encode(scalars_of("bob"), 9)
    with pytest.raises(ValueError, match="scalars: client 'bob': .*cannot add up to more than"):
        host.reply("bob", number, wide + np.array([2**50, 0, 0, 0]))
    assert host.reply("bob", number, wide)
    wanted = (3 * scalars_of("ann") + 9 * scalars_of("bob")) / 12
    np.testing.assert_allclose(host.close(), wanted, atol=2.0**-20)
    assert host.ledger.records().reported == [{"ann": 3.0, "bob": 9.0}]


def answer_all(host: private.PrivateServer, round: int = 0) -> None:
    number = host.open(NAMES)
    for name in NAMES:
        host.reply(name, number, scalars_of(name, round))


def test_a_retry_and_a_crash_release_the_same_noise(tmp_path: Path):
    """And another sum gets another: their difference is not that of the sums."""
    host = started(tmp_path / "a", CENTRAL, secret=SECRET)
    shutil.copy(tmp_path / "a", tmp_path / "b")
    shutil.copy(tmp_path / "a", tmp_path / "c")
    answer_all(host)
    host.ledger._connection.execute("PRAGMA busy_timeout = 0")
    other = sqlite3.connect(tmp_path / "a", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(hj.LedgerWriteError):
        host.close()
    other.close()
    assert host.accountant.epsilon() == 0
    first = host.close()
    again = private.PrivateServer(ALGORITHM, fresh(), hj.Ledger.open(tmp_path / "b"), secret=SECRET)
    answer_all(again)
    np.testing.assert_array_equal(again.close(), first)
    third = private.PrivateServer(ALGORITHM, fresh(), hj.Ledger.open(tmp_path / "c"), secret=SECRET)
    answer_all(third, round=1)
    clipped = lambda r: sum(privacy.clip(scalars_of(n, r), 2.0, CENTRAL.grid)[:-1] for n in NAMES)  # noqa: E731
    plain = (clipped(1) - clipped(0)) * CENTRAL.grid.step / 5
    assert np.abs(third.close() - first - plain).min() > 1e-3


def test_the_budget_ends_a_run_before_it_is_exceeded_also_after_a_restart(tmp_path: Path):
    path = tmp_path / "a"
    host = started(path, CENTRAL, secret=SECRET)
    rounds, spent = 0, []
    with pytest.raises(privacy.BudgetSpent, match="would make epsilon 2.* the budget is 2"):
        for rounds in range(100):
            answer_all(host, rounds)
            host.close()
            spent.append(private.accountant_of(host.ledger).epsilon())
            assert spent[-1] == host.accountant.epsilon() <= 2.0
            host.ledger.close()  # resumed after every round, the account is the same
            ledger = hj.Ledger.open(path)
            host = private.PrivateServer(ALGORITHM, fresh(), ledger, secret=SECRET)
    assert host.round == rounds == len(spent) > 1
    assert spent[-1] == privacy.epsilon_of({(4.0, 1.0): rounds}, 1e-5)
    assert privacy.epsilon_of({(4.0, 1.0): rounds + 1}, 1e-5) > 2.0
    assert host.open(["zoe"]) == rounds  # who has not taken part has given nothing away


def test_what_a_void_round_could_have_shown_is_charged(tmp_path: Path):
    """Where clients add the noise: to a server that is not trusted, all it was sent is released."""
    terms = privacy.Terms.of(privacy.local(4.0, 6.0, clients=2))
    host = started(":memory:", terms)
    for number in range(3):
        host.open(["ann", "bob"])
        given = terms.contribute(scalars_of("ann"), client="ann", round=number, secret=SECRET)
        assert host.reply("ann", number, given)
        assert np.isnan(host.close(minimum=2)).all()
    assert host.ledger.records().reported == [{"ann": 1.0}] * 3
    found = private.accountant_of(host.ledger)
    alone = privacy.epsilon_of({(terms.mechanism.event["noise"], 1.0): 3}, terms.delta)
    assert found.epsilon() == host.accountant.epsilon() == alone > 0
    host.open(["ann", "bob"])  # nobody replies: nothing was shown
    host.close()
    assert host.ledger.events()[3] is None

    path = tmp_path / "ledger"
    asked_to_reveal(started(path, DISTRIBUTED, directory=DIRECTORY), NAMES[:4])  # then it is killed
    again = private.PrivateServer(ALGORITHM, fresh(), hj.Ledger.open(path), directory=DIRECTORY)
    again.open(NAMES)
    assert np.isnan(again.close()).all()
    assert again.ledger.records().reported == [dict.fromkeys(NAMES[:4], 1.0)]
    assert again.ledger.events() == [DISTRIBUTED.mechanism.event]
    assert private.accountant_of(again.ledger).epsilon() == again.accountant.epsilon() > 0
    again.open(NAMES)
    again.close()
    assert again.ledger.events()[1] is None


def test_noise_of_another_size_is_other_noise():
    """Of one secret, one round and one sum: else two runs would show what each of them hides."""
    sizes = [privacy.Terms.of(privacy.central(4.0, noise, clients=2)) for noise in (6.0, 3.0)]
    total = np.append(np.arange(400), 2)
    large, small = (
        terms.release(total, round=0, secret=SECRET)[:-1].astype(float) - total[:-1]
        for terms in sizes
    )
    assert abs(np.corrcoef(large, small)[0, 1]) < 0.2
    assert 1.7 < large.std() / small.std() < 2.3


@pytest.mark.parametrize("clients, asked, rounds", [(10, 6, 10), (100, 40, 50), (50, 20, 200)])
def test_noise_for_an_epsilon_is_enough_for_a_balanced_draw(
    clients: int, asked: int, rounds: int, caplog: pytest.LogCaptureFixture
):
    noise = privacy.calibrate(8.0, rounds=rounds, clients=clients, asked=asked)
    assert not caplog.records
    accountant, everybody = privacy.Accountant(1e-5), [str(i) for i in range(clients)]
    for round in range(rounds):
        names = federation.draw(everybody, asked, round, balanced=True)
        accountant.spend({"noise": noise, "participation": "known"}, names)
    assert 7 < accountant.epsilon() <= 8


def test_an_event_that_is_changed_or_gone_is_found(tmp_path: Path):
    host = started(tmp_path / "a", CENTRAL, secret=SECRET)
    answer_all(host)
    host.close()
    host.ledger.close()
    for i, edit in enumerate((
        """UPDATE events SET json = replace(json, '4.0', '9.0')""", "DELETE FROM events",
        "INSERT INTO events VALUES (7, '{}')", "DROP TABLE events",
    )):  # fmt: skip
        shutil.copy(tmp_path / "a", path := tmp_path / f"{i}")
        with sqlite3.connect(path) as connection:
            connection.execute(edit)
        connection.close()
        with pytest.raises(hj.CorruptLedger, match="not as it was written|events of rounds"):
            hj.Ledger.open(path)


def test_distributed_noise_under_masks_has_the_size_that_is_claimed():
    """Of three survivors it is exactly what `least` = 3 promises."""
    host = started(":memory:", DISTRIBUTED, directory=DIRECTORY)
    errors = []
    for _ in range(30):
        record = masked_round(host, NAMES[:3], threshold=3)
        clipped = [privacy.clip(scalars_of(n), 2.0, DISTRIBUTED.grid)[:-1] for n in NAMES[:3]]
        errors.append(record.ravel() * 5 - sum(clipped) * DISTRIBUTED.grid.step)
    assert np.std(errors) == pytest.approx(4.0 * 2.0, rel=0.25)  # 90 numbers
    events = host.ledger.events()
    assert events == [{"noise": 4.0, "participation": "known"}] * 30
    assert host.accountant.most == NAMES[:3]
    assert np.isnan(masked_round(host, NAMES[:2])).all()


def test_a_secret_draw_leaves_no_names_and_an_empty_round_looks_like_any_other(tmp_path: Path):
    people = [str(i) for i in range(40)]
    terms = privacy.Terms.of(privacy.central(2.0, 4.0, clients=2, rate=0.05))
    host = started(tmp_path / "a", terms, secret=SECRET)
    sizes = []
    for round in range(40):
        drawn = host.open_drawn(people)
        for name in drawn:
            assert host.reply(name, round, np.ones((1, 3)))
        sizes.append(len(drawn))
        assert np.isfinite(host.close()).all()
    assert 0 in sizes and len(set(sizes)) > 2
    assert host.ledger.records().reported == [{}] * 40
    content = (tmp_path / "a").read_bytes()
    assert b'"39"' not in content
    amplified = privacy.epsilon_of({(4.0, 0.05): 40}, 1e-5)
    assert host.accountant.epsilon() == amplified < privacy.epsilon_of({(4.0, 1.0): 2}, 1e-5)
    host.open_drawn(people)
    with pytest.raises(ValueError, match="minimum: .*expected 1, got 2"):
        host.close(minimum=2)
    host.close()
    with pytest.raises(ValueError, match="secret draw; open rounds by open_drawn"):
        host.open(["ann"])


def test_what_breaks_the_analysis_is_refused_by_name():
    median = hj.decomfl(quadratic_loss, 0.05, aggregator=hj.aggregators.median())
    with pytest.raises(ValueError, match=r"aggregator: .*got median\(\)"):
        CENTRAL.check(median.spec)
    own = hj.decomfl(quadratic_loss, 0.05, per_client_directions=5)
    drawn = privacy.Terms.of(privacy.central(2.0, 4.0, clients=5, rate=0.1))
    for terms in (DISTRIBUTED, drawn, privacy.Terms(), privacy.Terms(masked=True)):
        with pytest.raises(ValueError, match="per_client_directions: scalars of 5 clients"):
            terms.check(own.spec)
    host = started(":memory:", CENTRAL, secret=SECRET)
    number = host.open(NAMES)
    with pytest.raises(ValueError, match="weight: client 'ann': .*expected 1, got 2"):
        host.reply("ann", number, scalars_of("ann"), 2)
    with pytest.raises(ValueError, match="client 'ann': .*which the server clips"):
        host.reply("ann", number, np.ones(4, np.int64))
    local = started(":memory:", privacy.Terms.of(privacy.local(2.0, 4.0, clients=5)))
    number = local.open(NAMES)
    with pytest.raises(ValueError, match="client 'ann': the ledger promises noise of its own"):
        local.reply("ann", number, scalars_of("ann"))
    noised = local.terms.contribute(scalars_of("ann"), client="ann", round=0, secret=SECRET)
    assert local.reply("ann", number, noised) and np.isfinite(local.close()).all()
    with pytest.raises(ValueError, match="secret: a central mechanism"):
        started(":memory:", CENTRAL)
    with pytest.raises(ValueError, match="directory: masked rounds"):
        started(":memory:", DISTRIBUTED)
    with pytest.raises(ValueError, match="ledger: :memory: promises nothing"):
        private.terms_of(hj.Ledger.create(":memory:", ALGORITHM, fresh()))


@pytest.mark.parametrize("kind", ["central", "local"])
@pytest.mark.filterwarnings("ignore:per_client_directions")
def test_clients_with_directions_of_their_own_have_each_the_noise_of_a_sum(kind: str):
    """They are warned about. A server and a simulation write one record, each block by itself."""
    own = hj.decomfl(quadratic_loss, 0.05, num_perturbations=3, per_client_directions=5)
    terms = privacy.Terms.of(getattr(privacy, kind)(2.0, 4.0, clients=4))
    with pytest.warns(UserWarning, match="per_client_directions: every client's"):
        terms.check(own.spec)
    state = own.init({"w": jnp.ones(33)}, jax.random.key(4))
    ledger = hj.Ledger.create(":memory:", own, state, privacy=terms.config)
    host = private.PrivateServer(own, state, ledger, secret=SECRET)
    secret = privacy.of_run(SECRET, private.run_name(ledger))
    simulated = private.Simulated(terms, secret, "run")
    secret_of = lambda name: simulated._own(b"noise", name)  # noqa: E731
    blocks, plain = [], []
    for round in range(20):
        assert host.open(NAMES) == round
        for name in NAMES[1:]:  # the first is away: nothing is released of it
            vector = scalars_of(name, round)
            sent = terms.contribute(vector, client=name, round=round, secret=secret_of(name))
            assert host.reply(name, round, sent if kind == "local" else vector)
        record = host.close()
        scalars = np.stack([scalars_of(name, round) for name in NAMES])
        summed = simulated(round, NAMES, scalars, np.array([0, 1, 1, 1, 1]), own.spec)
        np.testing.assert_array_equal(summed.record, record)
        assert summed.event == terms.mechanism.event == ledger.events()[round]
        assert record.shape == (1, 15) and not record[0, :3].any()
        blocks.append(record.reshape(5, 3)[1:] * 4 / 5)  # of the mean over all directions
        plain.append([privacy.clip(s, 2.0, terms.grid)[:-1] * terms.grid.step for s in scalars[1:]])
    assert np.std(np.array(blocks) - np.array(plain)) == pytest.approx(8.0, rel=0.15)
    assert host.accountant.epsilon() == simulated.accountant.epsilon()
    assert host.accountant.most == NAMES[1:]
    assert not np.isnan(host.state.params["w"]).any()


CLIENTS = federation.Clients({name: {"x": np.random.default_rng(i).normal(size=(6, 33)).astype(np.float32)}
                              for i, name in enumerate(NAMES)})  # fmt: skip


def loss(params: Any, batch: Any) -> jax.Array:
    return ((params["w"] - batch["x"].mean(0)) ** 2).mean()


def test_the_experiment_spends_the_budget_and_chooses_on_dev():
    """With clients in turns, each of whom answers for its own rounds; the table tells what ran."""
    from experiments import private as experiment

    size = experiment.Size(5, 2, 4)
    options = experiment.Private(rounds=20)
    most = experiment.own_rounds(CLIENTS, options.rounds, size.asked, seed=0)
    assert most == 20 * 2 // 4  # of five, two rounds of two make a turn
    for kind, both in (("central", 1), ("local", 2)):
        cell = experiment.Cell("mnist", size, kind, 8.0)
        added, charged = experiment.noises(options, cell, most)
        assert 7.9 < privacy.epsilon_of({(charged, 1.0): most}, options.delta) <= 8.0
        alone = privacy.epsilon_of({(added / both / 2**0.5, 1.0): most}, options.delta)
        # The sum of two local noises: each client has its own, for any other data.
        assert (alone == pytest.approx(8.0, rel=0.02)) == (kind == "local")
    rows = [
        experiment._row(options, cell, seed, dict(clip=2.0, learning_rate=rate))
        | dict(dev=0.5 + rate * (seed == 0), test=0.9 - rate)
        for cell in [experiment.Cell("mnist", experiment.SIZES["mnist"][0], "none", 0.0)]
        for rate in (0.1, 0.2)
        for seed in range(3)
    ]
    (line,) = experiment.table(options, rows)[1:]
    assert line[3:] == ["none", "none", "2", "0.2 (edge)", "3", "70.0 ± 0.0", ""]


@pytest.mark.parametrize("terms", [privacy.Terms(masked=True), DISTRIBUTED, dataclasses.replace(CENTRAL, epsilon=None)],
                         ids=["masked", "distributed", "central"])  # fmt: skip
def test_simulated_rounds_replay_and_show_no_losses(terms: privacy.Terms):
    alg = hj.decomfl(loss, 0.05, num_perturbations=3)
    make = lambda: alg.init({"w": jnp.ones(33)}, jax.random.key(4))  # noqa: E731
    options: Any = dict(rounds=4, clients_per_round=5, batch_size=2)
    summed = private.Simulated(terms, SECRET, "run")
    with hj.Ledger.create(":memory:", alg, make(), privacy=terms.config) as ledger:
        for report in federation.run(alg, make(), CLIENTS, summed=summed, **options):
            metrics = report.metrics
            ledger.append(metrics.record, hj.digest(report.state), metrics.learning_rate,
                          report.reported, report.event)  # fmt: skip
            assert np.isnan(metrics.losses).all() == np.isnan(metrics.loss) == bool(terms.mechanism)
        assert_same_bits(server.catch_up(alg, make(), ledger.records()), report.state)
        assert private.accountant_of(ledger).epsilon() == summed.accountant.epsilon()
        again = private.Simulated(terms, SECRET, "run")
        *_, last = federation.run(alg, make(), CLIENTS, summed=again, **options)
        assert_same_bits(last.state, report.state)
    if terms.mechanism is None:
        *_, last = federation.run(alg, make(), CLIENTS, **options)
        np.testing.assert_allclose(last.state.params["w"], report.state.params["w"], atol=1e-4)
