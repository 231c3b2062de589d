"""``hiso nvflare run`` without a network: when it submits again, and when it gives up."""

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hiso_jax.nvflare import job, session

OPTIONS = job.Options(text="review", labels=("down", "up"), rounds=4, deadline=30.0)


def test_run_submits_again_until_all_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Against a server that is away at times, and two jobs that end before their time."""
    # The second, of a server that was killed, is said to run for ever.
    ends = iter(["FINISHED:EXECUTION_EXCEPTION", "RUNNING", "FINISHED:COMPLETED"])
    said: list[str] = []

    class Stub:
        """What `session.Lead` asks a server, without one."""

        def __init__(self, kit: Path):
            self.asked = 0

        def connected(self) -> list[str]:
            self.asked += 1
            return [] if self.asked < 3 else list(OPTIONS.sites)

        def submit(self, folder: Path) -> str | None:
            self.asked += 1
            return f"job {self.asked}"

        def status(self, number: str) -> str:
            known, self.known = getattr(self, "known", ""), number
            return next(ends) if known == number else ""  # away when it is first asked

        def runs(self, number: str) -> bool:
            return False

        def close(self) -> None:
            self.asked = -1

    out = job.write(dataclasses.replace(OPTIONS, out=tmp_path / "job"))
    monkeypatch.setattr(session, "Lead", Stub)
    monkeypatch.setattr(session, "LOST", 0.0)
    assert session.run(session.Options(out, tmp_path), said.append, 0.0)
    assert len([text for text in said if "submitted as" in text]) == 3
    ends = iter(["FINISHED:ABORTED"])
    assert not session.run(session.Options(out, tmp_path), said.append, 0.0)
    for count, attempts in ((2, 2), (3, 20)):  # all are quick, so three are enough
        ends, before = iter(["FINISHED:ABNORMAL"] * 9), len(said)
        assert not session.run(session.Options(out, tmp_path, attempts), said.append, 0.0)
        assert len([text for text in said[before:] if "submitted as" in text]) == count
    assert "3 jobs in a row ended within 60 s" in said[-1]
    with pytest.raises(ValueError, match="--attempts: expected an int >= 1"):
        session.run(session.Options(out, tmp_path, attempts=0))


class Session:
    """NVFlare's session of a server that answers and does as it is told; a test makes it do worse."""

    def __init__(self) -> None:
        self.upload_dir, self.jobs = "", 0

    def get_system_info(self) -> Any:
        clients = [types.SimpleNamespace(name=name) for name in OPTIONS.sites]
        return types.SimpleNamespace(client_info=clients, job_info=[])

    def submit_job(self, folder: str) -> str:
        self.jobs += 1
        return f"job-{self.jobs}"

    def get_job_meta(self, job: str) -> dict[str, str]:
        return {"status": "FINISHED:COMPLETED"}

    def close(self) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a job with a session of this class; returns whether all is done, and what was said."""
    flare = pytest.importorskip(
        "nvflare.fuel.flare_api.flare_api", reason="needs the extra nvflare"
    )
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup/fed_admin.json").write_text("{}")
    monkeypatch.setattr(session, "LOST", 0.0)

    def run(found: Any, out: str = "job", **options: Any) -> tuple[bool, list[str]]:
        monkeypatch.setattr(flare, "new_secure_session", lambda *given: found)
        if not (tmp_path / out).exists():
            job.write(dataclasses.replace(OPTIONS, out=tmp_path / out))
        said: list[str] = []
        given: dict[str, Any] = dict(attempts=3, wait=0.0) | options
        return session.run(
            session.Options(tmp_path / out, tmp_path, **given), said.append, 0.0
        ), said

    return run


def test_run_ends_where_nvflare_refuses(server: Callable[..., Any]):
    """It would again; whatever else goes wrong is tried again, as often as was asked for."""
    flare = pytest.importorskip("nvflare.fuel.flare_api.flare_api")
    spec = pytest.importorskip("nvflare.fuel.flare_api.api_spec")
    assert server(Session()) == (
        True,
        ["submitted as job-1 (1 of at most 3 times)", "job-1: FINISHED:COMPLETED"],
    )
    real = Session()
    real.submit_job = functools.partial(flare.Session.submit_job, real)
    with pytest.raises(PermissionError, match="NVFlare refuses: .*'my job' contains unsupported"):
        server(real, "my job")
    for refusal in (spec.AuthorizationError, spec.AuthenticationError, spec.InvalidArgumentError):
        for call in ("submit_job", "get_system_info"):
            found = Session()
            setattr(found, call, raises(refusal("not you")))
            with pytest.raises(PermissionError, match="NVFlare refuses: not you"):
                server(found)
    away = Session()
    away.submit_job = raises(spec.NoConnection("nobody there"))
    done, said = server(away)
    assert not done and said == [
        f"could not be submitted ({n} of at most 3 times): NoConnection: nobody there"
        for n in (1, 2, 3)
    ]


def test_run_submits_again_what_the_server_does_not_know_any_more(server: Callable[..., Any]):
    """Its store of jobs is lost; and not for an answer that did not come."""
    spec = pytest.importorskip("nvflare.fuel.flare_api.api_spec")

    class Lost(Session):
        answers = iter([spec.NoConnection("away"), spec.JobNotFound("no such job: job-1"), None])

        def get_job_meta(self, job: str) -> dict[str, str]:
            if (error := next(self.answers)) is not None:
                raise error
            return super().get_job_meta(job)

    done, said = server(Lost())
    assert done and [text.split(" (")[0] for text in said] == [
        "submitted as job-1", "job-1: lost, since the server has been away", "submitted as job-2",
        "job-2: FINISHED:COMPLETED"]  # fmt: skip


@pytest.mark.parametrize("refused", [False, True], ids=["no answer", "refused"])
def test_run_ends_a_job_for_who_is_back_until_the_server_has_said_so(
    refused: bool, server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    """Where the answer is lost the job may have ended; where it is refused the job goes on."""
    spec = pytest.importorskip("nvflare.fuel.flare_api.api_spec")
    monkeypatch.setattr(session, "LOOK", 0.0)
    asked: list[str] = []

    class Running(Session):
        def get_job_meta(self, job: str) -> dict[str, str]:
            ends = "FINISHED:COMPLETED" if refused or job == "job-2" else "FINISHED:ABORTED"
            return {"status": ends if job == "job-2" or len(asked) == 3 else "RUNNING"}

        def get_system_info(self) -> Any:
            info = super().get_system_info()
            info.job_info = [types.SimpleNamespace(job_id="job-1")]
            return info

        def get_client_job_status(self, names: list[str]) -> list[dict[str, str]]:
            one, *others = OPTIONS.sites
            inside = [{"client_name": n, "job_id": "job-1", "status": "running"} for n in others]
            return [*inside, {"client_name": one, "status": "no jobs"}]

        def abort_job(self, job: str) -> None:
            asked.append(job)
            if refused or len(asked) < 3:
                raise (spec.AuthorizationError if refused else spec.NoConnection)("not now")

    done, said = server(Running())
    assert done and asked == ["job-1"] * 3
    assert [text for text in said if "ends, so that" in text] == [
        "job-1: ends, so that site-1 can take part again"
    ]
    assert any("submitted as job-2" in text for text in said) != refused


def raises(error: Exception) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        raise error

    return call
