"""``hiso nvflare run``: submit a job, and again whenever it ends before its time.

NVFlare ends a job when the server's process dies, or that of one site. A site whose machine was
away is not let into a job that runs, so the job is ended for it. Nothing is lost by either: the
ledger has every finished round, and a job submitted again goes on where it ends.
"""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro

from hiso_jax._engine import checks, extras
from hiso_jax.nvflare.parties import PLAN, Plan

QUICK, MOST_QUICK = 60.0, 3
"""Of a job that ends within so many seconds, so many in a row are enough: it will not do better."""
LOOK = 20.0
"""Seconds between looks for sites that are back; at the second one in a row they are let in."""
LOST = 10.0
"""Seconds for which the server says that a job runs, and has no process of it."""
NO_ANSWER = ("no_reply", "error")
"""What NVFlare says of a site that did not tell which jobs it has."""
RUNNING, GONE = "RUNNING", "GONE"
"""Of a job: NVFlare's word, and ours for one that the server does not know, or no more."""
FOR_THEM = "ended for who is back"
COMPLETED, ABORTED = "FINISHED:COMPLETED", "FINISHED:ABORTED"


@dataclasses.dataclass(frozen=True)
class Options:
    """Submit a job and stay with it: it is submitted again until all its rounds are done."""

    job: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="JOB")]
    """Folder that hiso nvflare job wrote."""
    kit: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="KIT")]
    """Startup kit of the one who may submit, with startup/fed_admin.json in it."""
    attempts: int = 100
    """Times that the job is submitted at most, or tried to be where the server is away."""
    wait: float = 60.0
    """Seconds to wait, before each submission, for sites that are not connected."""


class Lead:
    """A session of the one who submits; it is opened anew when the server has been away.

    Args:
      kit: the startup kit, whose folder has the name of the user.

    Attributes:
      why: what went wrong when the server could last not be asked.

    Raises:
      FileNotFoundError: it is none.
      ModuleNotFoundError: NVFlare is not installed.
    """

    def __init__(self, kit: Path):
        if not (kit / "startup/fed_admin.json").is_file():
            raise FileNotFoundError(
                f"kit: {kit}: no startup kit of one who may submit: expected "
                "startup/fed_admin.json in it"
            )
        try:
            from nvflare.fuel.flare_api import api_spec, flare_api
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "nvflare":
                raise
            needed = extras.needs("hiso nvflare run", "nvflare", "nvflare")
            raise ModuleNotFoundError(needed, name="nvflare") from None
        self._open: Callable[..., Any] = flare_api.new_secure_session
        self._unknown = api_spec.JobNotFound
        self._refusals = (api_spec.AuthenticationError, api_spec.AuthorizationError,
                          api_spec.InvalidArgumentError, api_spec.InvalidJobDefinition)  # fmt: skip
        self.kit, self._session, self.why = kit.absolute(), None, ""

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        """What the server says; None if it cannot be asked now.

        Raises:
          PermissionError: it refuses, as it would again.
        """
        try:
            if self._session is None:
                with contextlib.redirect_stdout(io.StringIO()):  # it says that it connects
                    self._session = self._open(self.kit.name, str(self.kit))
            return what(self._session)
        except self._refusals as error:
            raise PermissionError(f"NVFlare refuses: {error}") from None
        except Exception as error:  # of many kinds; the server may be starting
            self.why = f"{type(error).__name__}: {error}"
            self.close()
            return None

    def connected(self) -> list[str]:
        """Sites that are connected, sorted; none where the server is away."""
        info = self._ask(lambda session: session.get_system_info())
        return [] if info is None else sorted(client.name for client in info.client_info)

    def submit(self, job: Path) -> str | None:
        """Submit a job's folder; return what NVFlare calls it, or None if it could not be."""
        return self._ask(lambda session: session.submit_job(str(job.absolute())))

    def status(self, job: str) -> str:
        """How a job is, as NVFlare says it, or `GONE`; empty if the server cannot be asked."""

        def look(session: Any) -> str:
            try:
                return str(session.get_job_meta(job)["status"])
            except self._unknown:
                return GONE

        return self._ask(look) or ""

    def runs(self, job: str) -> bool:
        """Whether the server has a process of the job; true where it cannot be asked."""
        info = self._ask(lambda session: session.get_system_info())
        return info is None or job in [own.job_id for own in info.job_info or ()]

    def members(self, job: str, sites: Iterable[str]) -> tuple[set[str], set[str]]:
        """Sites with a process of the job, and those that are connected and have none."""
        there = sorted(set(sites) & set(self.connected()))
        rows = self._ask(lambda session: session.get_client_job_status(there)) if there else None
        inside = {row["client_name"] for row in rows or () if row.get("job_id") == job}
        told = {row["client_name"] for row in rows or () if row["status"] not in NO_ANSWER}
        return inside, told - inside

    def abort(self, job: str) -> bool:
        """End a job that runs; return whether the server has said that it does."""
        try:
            return self._ask(lambda session: (session.abort_job(job),)) is not None
        except PermissionError:  # the job then goes on as it is
            return False

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.close()
            self._session = None


def run(options: Options, say: Callable[[str], Any] = print, pause: float = 2.0) -> bool:
    """Stay with a job until all its rounds are done; return whether they are.

    Args:
      options: what and how often.
      say: called with what happens.
      pause: seconds between looks.

    Raises:
      ValueError: the folder is no job, or an option is out of range.
      FileNotFoundError: there is no startup kit.
      PermissionError: NVFlare refuses the job, or the one who submits it.
    """
    plan = Plan.read(options.job / "app/config" / PLAN)
    checks.count("--attempts", options.attempts)
    checks.number("--wait", options.wait, 0)
    lead, quick = Lead(options.kit), 0
    in_vain: set[str] = set()
    try:
        for attempt in range(1, options.attempts + 1):
            _wait_for(lead, plan, options.wait, say, pause)
            job, begin = lead.submit(options.job), time.monotonic()
            times = f"{attempt} of at most {options.attempts} times"
            if job is None:
                say(f"could not be submitted ({times}): {lead.why}")
                time.sleep(pause)
                continue
            say(f"submitted as {job} ({times})")
            status = _end_of(lead, job, plan, in_vain, say, pause)
            say(f"{job}: {status}")
            if status in (COMPLETED, ABORTED):
                return status == COMPLETED
            if status != FOR_THEM:
                quick = quick + 1 if time.monotonic() - begin < QUICK else 0
            if quick == MOST_QUICK:
                say(f"{quick} jobs in a row ended within {QUICK:.0f} s; the log of the server says "
                    "why")  # fmt: skip
                return False
            time.sleep(min(pause * attempt, 60))
        return False
    finally:
        lead.close()


def _end_of(
    lead: Lead, job: str, plan: Plan, in_vain: set[str], say: Callable[[str], Any], pause: float
) -> str:
    """Wait for the end of a job, or end it for sites that are back; return how it ended.

    `in_vain` are the sites for which the job was ended before and that have not been in one since.
    """
    back: set[str] = set()
    looked = runs = time.monotonic()
    asked = ended = False
    while not (status := lead.status(job)).startswith("FINISHED"):
        if status not in (RUNNING, GONE) or lead.runs(job):
            runs = time.monotonic()
        elif time.monotonic() - runs >= LOST:
            # A server that was killed goes on to say that its jobs run, when it is back; one whose
            # store is lost does not know them.
            return "lost, since the server has been away"
        if status == RUNNING and not asked and time.monotonic() - looked >= LOOK:
            inside, outside = lead.members(job, plan.sites)
            in_vain -= inside
            # Where nobody is inside, the job has come to its end, or will for want of answers.
            if inside and (again := sorted((back & outside) - in_vain)):
                say(f"{job}: ends, so that {', '.join(again)} can take part again")
                in_vain |= set(again)
                asked = True
            back, looked = outside, time.monotonic()
        if asked and not ended:  # again, if what the server said did not come here
            ended = lead.abort(job)
        time.sleep(pause)
    return FOR_THEM if asked and status == ABORTED else status


def _wait_for(
    lead: Lead, plan: Plan, patience: float, say: Callable[[str], Any], pause: float
) -> None:
    end = time.monotonic() + patience
    while missing := sorted(set(plan.sites) - set(lead.connected())):
        if time.monotonic() >= end:
            return say(f"not connected, and not waited for: {', '.join(missing)}")
        time.sleep(pause)


def cli(options: Options) -> None:
    """Run, and say where the results are; exit with 1 unless all rounds are done."""
    if not run(options):
        sys.exit(1)
    print("The model, rounds.jsonl and result.json are in hiso/NAME of the server's kit, the model "
          "and measured.json in that of each site.")  # fmt: skip
