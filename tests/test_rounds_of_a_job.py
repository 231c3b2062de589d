"""The rounds of `HisoController` without NVFlare's processes: what is written, kept and said."""

import json
import resource
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("nvflare", reason="the engine is the extra hiso-jax[nvflare]")

import hiso_jax as hj
from hiso_jax import federation
from hiso_jax.ledger import store
from hiso_jax.nvflare import engine, notes
from hiso_jax.nvflare import parties as nvflare_parties
from hiso_jax.train import rows
from tests import parties
from tests.parties import NAMES

ALGORITHM = parties.algorithm()


class Signal:
    """As NVFlare's: whether the job is to end."""

    triggered = False


class Controller(engine.HisoController):
    """NVFlare is left out: messages go to sites of this process, and who has none is gone."""

    def __init__(self, sites: dict[str, Any]):
        super().__init__()
        self.sites, self.said = sites, []

    def _send(self, name: str, message: bytes) -> None:
        if name in self.sites and self._host is not None:
            self._host.receive(name, self.sites[name].answer(message))

    def _is_gone(self, name: str) -> bool:
        return name not in self.sites

    def _cancel(self) -> None:
        pass

    def _say(self, text: str) -> None:
        self.said.append(text)


def sites(names: list[str] = NAMES, **options: Any) -> dict[str, Any]:
    return {name: parties.site(name, ALGORITHM, **options) for name in names}


def run(controller: Controller, folder: Path, **options: Any) -> list[rows.Row]:
    """Go through the rounds of a job; return the lines of the file, of which each is whole."""
    given: dict[str, Any] = dict(
        name="hiso", sites=NAMES, rounds=4, clients_per_round=3, deadline=5.0
    )
    plan = nvflare_parties.Plan(**given | options)
    party = nvflare_parties.Party(ALGORITHM, lambda: parties.begin(ALGORITHM))
    folder.mkdir(exist_ok=True)
    controller._run(plan, folder, party, Signal())
    return rows.read(folder / "rounds.jsonl")


def test_a_job_whose_rounds_are_void_says_who_answered_and_how_many_must(tmp_path: Path):
    """Two of three answer in every round, and three needed."""
    controller = Controller(sites(NAMES[:2]))
    with pytest.raises(RuntimeError, match="last 2 rounds; in the last one: 2 answered, 3 needed; "
                       "silent: site-3. Submit the job again"):  # fmt: skip
        run(controller, tmp_path, min_responses=3, most_empty=2)
    found = rows.read(tmp_path / "rounds.jsonl")
    assert [sorted(row["answered"]) for row in found] == [NAMES[:2]] * 2
    assert {row["void"] for row in found} == {"2 answered, 3 needed"}
    assert any("2 answered, 3 needed; silent: site-3;" in text for text in controller.said)
    with pytest.raises(RuntimeError, match="0 answered, 1 needed; silent: (site-., ){2}site-."):
        run(Controller({}), tmp_path / "nobody", most_empty=1)


def test_a_masked_round_that_is_void_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Too few are there to begin with; or all are, and one gives what no client encodes."""
    pytest.importorskip("cryptography", reason="needs the extra secure")
    pytest.importorskip("Crypto", reason="needs the extra secure")
    from tests import test_masked_sites as masked_sites

    (tmp_path / "rootCA.pem").write_bytes(masked_sites.AUTHORITY)
    monkeypatch.setattr(engine, "_kit", lambda context: tmp_path)
    options: Any = dict(privacy=masked_sites.TERMS.config, step_deadline=0.3, most_empty=1)
    promised = lambda name: masked_sites.masks(name, masked_sites.TERMS)  # noqa: E731
    there = {name: parties.site(name, ALGORITHM, promised=promised(name)) for name in NAMES}
    two = {name: there[name] for name in NAMES[:2]}
    with pytest.raises(RuntimeError, match="2 answered, 3 needed; silent: site-3"):
        run(Controller(two), tmp_path / "few", **options)
    lie = lambda *given, **more: np.array([0, 0, 2**40])  # noqa: E731
    there["site-3"]._masks.terms = types.SimpleNamespace(least=0, contribute=lie)
    with pytest.raises(RuntimeError, match="the last one: total: expected a weight of 3 to 3"):
        run(Controller(there), tmp_path / "false", **options)
    (row,) = rows.read(tmp_path / "false/rounds.jsonl")
    assert sorted(row["answered"]) == NAMES and row["void"].startswith("total: ")


@pytest.mark.parametrize("own", [None, 3], ids=["shared directions", "a client's own"])
def test_a_disk_that_is_full_keeps_the_round(
    own: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where clients have directions of their own, places are written before anybody is asked."""
    alg = parties.algorithm(per_client_directions=own)
    state = parties.begin(alg)
    ledger = hj.Ledger.create(tmp_path / "ledger.sqlite", alg, state)
    controller = Controller({name: parties.site(name, alg) for name in NAMES})
    server = federation.Server(alg, state, ledger)
    host = controller._host = federation.Host(server, controller._send)
    plan = nvflare_parties.Plan("hiso", tuple(NAMES), 3, 3, deadline=5.0)
    full = {"open_round": 2, "append": 2}  # times that it fails
    for name in full:
        write = getattr(hj.Ledger, name)

        def tried(ledger: hj.Ledger, *given: Any, name: str = name, write: Any = write) -> Any:
            if full[name]:
                full[name] -= 1
                raise store.LedgerWriteError(f"{name}: the disk is full")
            return write(ledger, *given)

        monkeypatch.setattr(hj.Ledger, name, tried)
    monkeypatch.setattr(engine, "LOOK_AGAIN", 0.0)
    closed = controller._round(host, plan, NAMES, Signal())
    assert closed is not None and len(closed.reported) == 3 and ledger.rounds == 1
    assert full["append"] == 0 and full["open_round"] == (0 if own else 2)
    kept = [text for text in controller.said if "round 0 is kept until it can be recorded" in text]
    assert len(kept) == (4 if own else 2)


def test_a_line_that_was_cut_off_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a job whose disk is full for a moment, the line is written behind the next round."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    add = notes.Notes.add

    def noted(lines: notes.Notes, row: rows.Row, traffic: Any) -> None:
        size = (tmp_path / "rounds.jsonl").stat().st_size if row["round"] else 0
        if row["round"] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limit[1]))
        try:
            add(lines, row, traffic)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(notes.Notes, "add", noted)
    controller = Controller(sites())
    assert [row["round"] for row in run(controller, tmp_path)] == [0, 1, 2, 3]
    assert any("line of round 1: " in text and "File too large" in text for text in controller.said)
    assert any("round 2/4: 3 count" in text for text in controller.said)


def test_rounds_whose_line_is_missing_have_one_when_the_job_goes_on(tmp_path: Path):
    """The process was killed in the midst of a line, and behind a record; bytes are added up."""
    first = run(Controller(sites()), tmp_path, rounds=3)
    assert all(len(row["answered"]) == 3 and "void" not in row for row in first)
    path = tmp_path / "rounds.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in first[:1]) + '{"round": 1, "sec')
    found = run(Controller(sites()), tmp_path, rounds=4)
    assert [row["round"] for row in found] == [0, 1, 2, 3]
    assert found[0] == first[0]
    assert found[1:3] == [{"round": n, "note": notes.NO_NOTE} for n in (1, 2)]
    up = 3 * (8 + 8)  # of a round: scalars and digest of three sites
    assert [row["payload_up"] for row in (*first, found[3])] == [up, 2 * up, 3 * up, 2 * up]
    path.unlink()  # all lines are lost
    found = run(Controller(sites()), tmp_path, rounds=4)
    assert found == [{"round": n, "note": notes.NO_NOTE} for n in range(4)]
