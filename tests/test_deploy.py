"""What real clients need before a network: the job, the machines' own settings, and the parties."""

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.nvflare import job, machine, parties, sockets
from hiso_jax.train import cli, finetune, predict, settings, watch
from tests.helpers import REVIEWS, assert_same_bits

OPTIONS = job.Options(text="review", labels=("down", "up"), rounds=4, deadline=30.0)


def test_a_job_has_the_options_of_finetune_and_no_path_of_a_site(tmp_path: Path):
    out = job.write(dataclasses.replace(OPTIONS, out=tmp_path / "job", num_perturbations=7))
    made = {str(p.relative_to(out)): json.loads(p.read_text()) for p in out.rglob("*.json")}
    assert made["meta.json"]["deploy_map"] == {"app": ["server", "site-1", "site-2", "site-3"]}
    server, client = (made[f"app/config/config_fed_{side}.json"] for side in ("server", "client"))
    assert server["server"]["task_request_interval"] == 0.05
    assert server["workflows"][0]["args"] == {"task_check_period": 0.05}
    assert client["default_task_fetch_interval"] == 0.05
    named = [server["workflows"][0]["path"], client["executors"][0]["executor"]["path"]]
    assert tuple(named) == machine.CLASSES
    plan = parties.Plan.read(out / "app/config" / parties.PLAN)
    assert plan == job.check(dataclasses.replace(OPTIONS, num_perturbations=7))
    assert plan.options["num_perturbations"] == 7 and plan.options["labels"] == ["down", "up"]
    assert not {"data", "out", *job.OF_A_SIMULATION} & plan.options.keys()
    with pytest.raises(FileExistsError, match="--out: .*job exists"):
        job.write(dataclasses.replace(OPTIONS, out=out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job"]


@pytest.mark.parametrize(
    "given,text",
    [
        (dict(data=Path("a.csv")), "--data: each site's own"),
        (dict(dropout=0.5), "--dropout: for simulations only"),
        (dict(secure=True, threshold=1), "threshold: expected more than half of 3"),
        (dict(threshold=2), "--threshold: of masked rounds, which need --secure"),
        (dict(epsilon=2.0), "--clip: needed, for --epsilon and --clip go together"),
        (dict(clients=3), "--clients: for simulations only"),
        (dict(sampling="size"), "--sampling: expected uniform or balanced, got 'size'"),
        (dict(labels=()), "--labels: needed, the values of column 'label' at all sites"),
        (dict(labels=("up", "up")), "--labels: expected two or more, all different"),
        (dict(labels=("up",)), "--labels: expected two or more, all different"),
        (dict(task="sst2", text=None), "--labels: --task sst2 has its own"),
        (dict(method="fedavg", learning_rate=0.1), "--method: expected one whose clients send scalars"),
        (dict(method="rms"), "--learning-rate: none was tuned for rms"),
        (dict(sites=("a", "a")), "--sites: expected different names"),
        (dict(clients_per_round=4), "--clients-per-round: expected at most 3"),
        (dict(min_responses=4), "--min-responses: expected at most 3"),
        (dict(min_responses=0), "--min-responses: expected an int >= 1"),
        (dict(deadline=0), "--deadline: expected a finite number > 0"),
        (dict(grace=-1), "--grace: expected a finite number >= 0"),
        (dict(name="a/b"), "--name: expected the name of a folder, got 'a/b'"),
        (dict(rounds=0), "--rounds: expected an int >= 1"),
        (dict(text=None), "--text: needed with --data"),
        (dict(party="os"), "--party: expected module:function, got 'os'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_options_that_make_no_job_are_named_and_nothing_is_written(
    given: dict[str, Any], text: str, tmp_path: Path
):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        job.write(dataclasses.replace(OPTIONS, out=tmp_path / "job", **given))
    assert list(tmp_path.iterdir()) == []


OTHERS: dict[str, Any] = dict(
    compare=True, resume=Path("run"), mesh=1, distributed=True, split="iid", clients=3,
    alpha=0.1, client_column="ward", dropout=0.5, answers=True, log="csv", select="random",
    budget=7, renew=2, eval_every=3,
)  # fmt: skip
"""Options of a simulation, each with a value that is not its default."""


@pytest.mark.parametrize("name", job.OF_A_SIMULATION)
def test_an_option_of_a_simulation_is_refused_and_the_help_says_so(name: str):
    assert getattr(OPTIONS, name) != OTHERS[name]
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"^{option}: for simulations only"):
        job.check(dataclasses.replace(OPTIONS, **{name: OTHERS[name]}))
    assert re.search(rf"{option}[,.]", " ".join((job.Options.__doc__ or "").split()))


def test_a_threshold_may_be_more_than_the_neighbors_that_a_site_has_by_default():
    """With one, masks are shared among all; half of who is asked is what it must exceed."""
    secure = pytest.importorskip("hiso_jax.secure")
    sites = tuple(f"site-{number}" for number in range(50))
    asked = dict(sites=sites, clients_per_round=50, secure=True)
    for threshold in (26, 40, 50):
        plan = job.check(dataclasses.replace(OPTIONS, **asked, threshold=threshold))
        assert plan.needed == threshold
        assert secure.Session("run", 0, sites, 9, threshold, None, threshold).circle_size == 50
    for threshold in (25, 51):
        with pytest.raises(ValueError, match="threshold: expected more than half of 50"):
            job.check(dataclasses.replace(OPTIONS, **asked, threshold=threshold))


def test_so_many_must_answer():
    """Of masked rounds the threshold, by default more than two thirds; else --min-responses."""
    needed = lambda **given: job.check(dataclasses.replace(OPTIONS, **given)).needed  # noqa: E731
    assert (needed(), needed(min_responses=2), needed(secure=True)) == (1, 2, 3)
    assert (
        needed(secure=True, threshold=2),
        needed(secure=True, threshold=2, min_responses=3),
    ) == (2, 3)


def test_a_budget_is_for_the_sites_that_it_was_made_for():
    """So a site that is new cannot join under the same name, as docs/deploy.md says."""
    pytest.importorskip("dp_accounting", reason="needs the extra dp")
    given = dict(epsilon=8.0, clip=2.0, sampling="balanced", rounds=60)
    promises = [
        job.check(dataclasses.replace(OPTIONS, **given, sites=sites)).privacy
        for sites in (OPTIONS.sites, (*OPTIONS.sites, "site-4"))
    ]
    assert promises[0] != promises[1]


def test_a_job_promises_the_noise_that_its_own_draw_needs():
    """For the site that is asked most, which turns keep from being asked more than the others."""
    privacy = pytest.importorskip("hiso_jax.privacy")
    pytest.importorskip("dp_accounting", reason="needs the extra dp")
    given = dataclasses.replace(OPTIONS, rounds=30, epsilon=8.0, clip=2.0, secure=True,
                                clients_per_round=2, sites=("a", "b", "c", "d"), threshold=2)  # fmt: skip
    plans = {s: job.check(dataclasses.replace(given, sampling=s)) for s in ("uniform", "balanced")}
    noise = {}
    for sampling, plan in plans.items():
        assert parties.Plan(**json.loads(plan.text())) == plan
        terms = plan.terms
        assert terms is not None and terms.mechanism is not None and terms.masked
        assert (terms.kind, terms.least, terms.epsilon, terms.mechanism.clients) == (
            "distributed", 2, 8.0, 2)  # fmt: skip
        accountant = privacy.Accountant(terms.delta)
        for round in range(30):
            accountant.check(terms.mechanism.event, plan.draw(round), 8.0)
            accountant.spend(terms.mechanism.event, plan.draw(round))
        assert 7.9 < accountant.epsilon() <= 8.0
        noise[sampling] = terms.mechanism.noise_multiplier
    assert noise["balanced"] < noise["uniform"]
    central = job.check(dataclasses.replace(given, secure=False, threshold=0)).terms
    assert central is not None and central.kind == "central" and not central.masked
    assert job.check(OPTIONS).terms is None


def test_on_the_command_line(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]):
    def hiso(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["hiso", "nvflare", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return f"{' '.join(capsys.readouterr().out.split())} exit {code}"

    assert "site prepare a machine's startup kit" in hiso()
    assert "expected one of site, job, run, got 'jbo'" in hiso("jbo")
    out = tmp_path / "a job"
    given = ("--text", "review", "--labels", "down", "up", "--out", str(out), "--rounds", "4")
    said = hiso("job", *given, "--model", "MODEL")
    assert f"hiso nvflare run '{out}' KIT exit 0" in said and out.is_dir()
    assert "exists; nothing is written over exit 1" in hiso("job", *given)
    kit = tmp_path / "kit"
    assert "no startup kit of NVFlare" in hiso("site", str(kit))
    for part in ("startup", "local"):
        (kit / part).mkdir(parents=True)
    assert "local/hiso.json exit 0" in hiso("site", str(kit))
    assert "no startup kit of one who may submit" in hiso("run", str(out), str(kit))
    assert "not the plan of a job" in hiso("run", str(tmp_path), str(kit))


def test_a_machine_is_prepared_and_keeps_what_it_had(tmp_path: Path):
    for part in ("startup", "local"):
        (tmp_path / part).mkdir()
    default: dict[str, Any] = {"format_version": 2, "class_allow_list": ["a.B"], "allow_log_streaming": True,
                               "components": [{"args": {"uri_root": "/tmp/nvflare/jobs", "n": 3}}]}  # fmt: skip
    (tmp_path / "local/resources.json.default").write_text(json.dumps(default))
    (tmp_path / "reviews.csv").write_text("review,label\n")
    data = tmp_path / "reviews.csv"
    machine.prepare(machine.Options(tmp_path, data=data, functions=("mine:party",)))
    for _ in range(2):  # once more changes nothing
        machine.prepare(machine.Options(tmp_path, model="/models/opt"))
        made = json.loads((tmp_path / "local/resources.json").read_text())
        store = {"args": {"uri_root": str(tmp_path / "store/jobs"), "n": 3}}
        assert made == default | {"components": [store]} | {
            "class_allow_list": ["a.B", *machine.CLASSES],
            "allow_log_streaming": False,
        }
        found = parties.read_local(tmp_path / "local", Path("kept"), "site-1")
        assert found == parties.Local(
            Path("kept"), "site-1", data.absolute(), "/models/opt", ("mine:party",)
        )
    with pytest.raises(FileNotFoundError, match="--data: .*gone"):
        machine.prepare(machine.Options(tmp_path, data=tmp_path / "gone"))
    with pytest.raises(ValueError, match="--functions: expected module:function, got 'mine'"):
        machine.prepare(machine.Options(tmp_path, functions=("mine",)))
    for content, text in (("{", "expected an object in JSON"), ("[]", "expected an object"),
                          ('{"dta": "x"}', r"any of \['data', 'folder', 'functions', 'model'\], got \['dta'\]"),
                          ('{"data": 3}', "data: expected a text, got 3"),
                          ('{"functions": "os:system"}', "functions: expected a list of texts")):  # fmt: skip
        (tmp_path / "local/hiso.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            parties.read_local(tmp_path / "local", tmp_path, "site-1")


def test_a_machines_settings_may_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert parties.read_local(tmp_path, Path("kept"), None) == parties.Local(Path("kept"))
    (tmp_path / "site-1").mkdir()
    own = {"data": "a.csv", "folder": "/elsewhere"}
    (tmp_path / "site-1/hiso.json").write_text(json.dumps(own))
    monkeypatch.setenv(parties.VARIABLE, str(tmp_path / "{site}/hiso.json"))
    found = parties.read_local(Path("gone"), Path("kept"), "site-1")
    assert (found.data, found.folder) == (Path("a.csv"), Path("/elsewhere"))
    with pytest.raises(ValueError, match="HISO_LOCAL: .*server/hiso.json: no such file"):
        parties.read_local(Path("gone"), Path("kept"), None)


def test_a_job_calls_nothing_that_a_machine_does_not_let_it(tmp_path: Path):
    plan = dataclasses.replace(job.check(OPTIONS), party="os:getcwd")
    for own in ((), ("os:listdir",)):
        with pytest.raises(PermissionError, match="--party: os:getcwd is not among the functions"):
            plan.make(parties.Local(tmp_path, functions=own))
    options = dataclasses.replace(OPTIONS, method="antigravity:geohash", learning_rate=0.1)
    given = dataclasses.asdict(options) | {"labels": ["down", "up"], "data": None}
    with pytest.raises(PermissionError, match="--method: antigravity:geohash is not among"):
        parties.finetune(given, parties.Local(tmp_path))


@pytest.fixture
def reviews(tmp_path: Path) -> dict[str, Path]:
    """Each site's own file; one of them lacks a label."""
    found = {}
    for number, name in enumerate(OPTIONS.sites):
        rows = [
            r
            for i, r in enumerate(REVIEWS)
            if i % 3 == number and (number != 1 or r["mood"] == "up")
        ]
        found[name] = tmp_path / f"{name}.csv"
        lines = [f"{row['review']},{row['mood']}" for row in rows]
        found[name].write_text("\n".join(["review,label", *lines]) + "\n")
    return found


@pytest.mark.slow
@pytest.mark.ci
def test_a_text_task_on_a_model_with_data_at_the_sites_only(
    tiny: Path, reviews: dict[str, Path], tmp_path: Path
):
    """Server and sites of one job hold the same model; the server never sees a row."""
    options = dataclasses.replace(OPTIONS, model=str(tiny), length=24, learning_rate=1e-3, rounds=2,
                                  batch_size=2, num_perturbations=2)  # fmt: skip
    plan = parties.Plan(**json.loads(job.check(options).text()))
    hosted = plan.make(parties.Local(tmp_path / "server"))
    assert hosted.batches is None
    with pytest.raises(ValueError, match="data: needed in this site's own hiso.json"):
        plan.make(parties.Local(tmp_path, "site-1"))
    with pytest.raises(ValueError, match="'ward-9' is none of .*, which the job names"):
        plan.number_of("ward-9")
    sites = {}
    for number, (name, data) in enumerate(reviews.items()):
        own = plan.make(parties.Local(tmp_path / name, name, data))
        assert own.batches is not None and plan.number_of(name) == number
        batches = lambda round, own=own, number=number: own.batches(round, number)  # noqa: E731
        finish = lambda state, own=own, name=name: own.finish(tmp_path / name, state)  # noqa: E731
        sites[name] = federation.Site(own.algorithm, own.begin, batches, None, 50, finish)
    state = hosted.begin()
    ledger = hj.Ledger.create(tmp_path / "ledger.sqlite", hosted.algorithm, state, hosted.about)
    server = federation.Server(hosted.algorithm, state, ledger)
    host = federation.Host(server, lambda name, ask: host.receive(name, sites[name].answer(ask)))
    for number in range(plan.rounds):
        names = federation.draw(plan.sites, plan.clients_per_round, number, plan.seed)
        closed = host.conduct(names, plan.deadline)
        assert closed is not None and closed.faults == {} and len(closed.reported) == 3
    assert host.end(plan.sites, 60) == list(plan.sites)
    for site in sites.values():
        assert_same_bits(site.state, server.state)
    hosted.finish(tmp_path / "server", server.state)
    weights = [
        (tmp_path / name / "model/model.safetensors").read_bytes() for name in ("server", *sites)
    ]
    assert len(set(weights)) == 1
    measured = json.loads((tmp_path / "site-1/measured.json").read_text())
    assert measured["test_before"]["loss"] != measured["test_after"]["loss"]
    assert not np.array_equal(weights[0], (tiny / "model.safetensors").read_bytes())
    assert ledger.header["about"] == {"task": "docstrings"}
    named = []
    for name in ("server", "site-1"):  # both can label rows with it
        out = tmp_path / f"{name}-labeled.csv"
        predict.predict(tmp_path / name, reviews["site-1"], out)
        named.append(out.read_text())
        assert json.loads((tmp_path / name / "labels.json").read_text())[0]["label"] == "down"
    assert named[0] == named[1] and len(set(re.findall(r",(down|up),0\.\d{4}\n", named[0]))) >= 1
    assert "train" not in (tmp_path / "server/labels.json").read_text()  # it counts nobody's rows
    with pytest.raises(ValueError, match="is of a job of hiso nvflare"):
        watch.watch(tmp_path / "site-1")
    with pytest.raises(SystemExit, match="is a run of `hiso nvflare`"):
        settings.settle(finetune.Options(resume=tmp_path / "site-1"))
    with pytest.raises(ValueError, match="is no run.*there is one in .*server"):
        predict.read_run(tmp_path)


def test_a_process_counts_what_it_sends():
    before = sockets.Wire().look()
    assert len(before) == 2 and min(before) >= 0


def test_a_site_s_folder_has_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two jobs of one name, or two sites of one folder: the second waits, and is refused."""
    pytest.importorskip("nvflare", reason="the engine is the extra hiso-jax[nvflare]")
    from nvflare.apis.event_type import EventType

    from hiso_jax.nvflare import engine

    options: Any = dict(
        name="run", sites=["site-1"], rounds=1, clients_per_round=1, party="tests.parties:party"
    )
    (tmp_path / parties.PLAN).write_text(parties.Plan(**options).text())
    (tmp_path / "hiso.json").write_text('{"functions": ["tests.parties:party"]}')
    asked = dict(root_dir=tmp_path, site_config_dir=tmp_path, startup_kit_dir=tmp_path)
    workspace = mock.Mock(**{f"get_{name}.return_value": str(p) for name, p in asked.items()})
    workspace.get_app_config_dir.return_value = str(tmp_path)
    context = mock.Mock()
    context.get_workspace.return_value = workspace
    context.get_identity_name.return_value = "site-1"
    failed: list[str] = []
    monkeypatch.setattr(engine.HisoExecutor, "log_info", lambda *_: None)
    monkeypatch.setattr(
        engine.HisoExecutor, "log_exception", lambda *given: failed.append(given[-1])
    )
    monkeypatch.setattr(engine, "WAIT_FOR_FOLDER", 0.3)
    one, other = engine.HisoExecutor(), engine.HisoExecutor()
    for executor in (one, other):
        executor.handle_event(EventType.START_RUN, context)
    assert failed == ["this site cannot take part"]
    with pytest.raises(BlockingIOError, match="run: another process is running there"):
        other._begin(context)
    ends = threading.Timer(0.3, one.handle_event, (EventType.END_RUN, context))
    monkeypatch.setattr(engine, "WAIT_FOR_FOLDER", 30.0)
    ends.start()
    other.handle_event(EventType.START_RUN, context)
    ends.join()
    assert len(failed) == 1 and other._site is not None
    other.handle_event(EventType.END_RUN, context)
    monkeypatch.setattr(engine, "_promised", mock.Mock(side_effect=OSError("no certificate")))
    third = engine.HisoExecutor()
    for _ in range(2):  # who cannot begin lets the folder go
        with pytest.raises(OSError, match="no certificate"):
            third._begin(context)
