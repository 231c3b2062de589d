"""NVFlare as the engine: it brings bytes from one machine to another.

What is said in those bytes is `hiso_jax.federation`'s (`hiso_jax.federation.Host` and
`hiso_jax.federation.Site`). Another engine would be another file like this one.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hiso_jax import federation, privacy
from hiso_jax._engine import extras, files
from hiso_jax.federation import wire
from hiso_jax.federation.host import Closed, Count, Host
from hiso_jax.ledger import digests, snapshots
from hiso_jax.ledger.store import Ledger, LedgerWriteError
from hiso_jax.nvflare import notes
from hiso_jax.nvflare.parties import PLAN, TASK, Local, Party, Plan, read_local
from hiso_jax.nvflare.sockets import Wire
from hiso_jax.protocol import Algorithm
from hiso_jax.train import folders

try:
    from nvflare.apis.client import Client
    from nvflare.apis.controller_spec import ClientTask, Task
    from nvflare.apis.event_type import EventType
    from nvflare.apis.executor import Executor
    from nvflare.apis.fl_constant import ReturnCode
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.impl.controller import Controller
    from nvflare.apis.shareable import Shareable, make_reply
    from nvflare.apis.signal import Signal
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "nvflare":
        raise
    needed = extras.needs("hiso_jax.nvflare.engine", "nvflare", "nvflare")
    raise ModuleNotFoundError(needed, name="nvflare") from None

MESSAGE = "message"
LOOK_AGAIN = 10.0
"""Seconds until a round that could not be recorded (a full disk) is tried again."""
WAIT_FOR_FOLDER = 60.0
"""Seconds that a site which begins waits for the process of the job before to be gone."""


def _opened(fl_ctx: FLContext, site: str | None) -> tuple[Plan, Local]:
    """The plan of the job, and what this machine's own file says."""
    workspace = fl_ctx.get_workspace()
    root = Path(workspace.get_root_dir())
    plan = Plan.read(Path(workspace.get_app_config_dir(fl_ctx.get_job_id())) / PLAN)
    local = read_local(Path(workspace.get_site_config_dir()), root / "hiso", site)
    return plan, local._replace(folder=local.folder / plan.name)


def _kit(fl_ctx: FLContext) -> Path:
    """Folder of this machine's keys and certificates."""
    return Path(fl_ctx.get_workspace().get_startup_kit_dir())


def _promised(plan: Plan, folder: Path, name: str, kit: Path) -> Any:
    """A site's side of what a job promises: of masked rounds, a key that its certificate proves.

    Journal and secret are in the folder that outlives the job.
    """
    if (terms := plan.terms) is None or not terms.masked:
        return terms
    from hiso_jax import secure  # needs the extra `secure`
    from hiso_jax.federation import masked

    folder.mkdir(parents=True, exist_ok=True)
    identity = secure.Identity(*((kit / f"client.{end}").read_bytes() for end in ("key", "crt")))
    journal = secure.Journal(folder / "journal")
    secret = None if terms.kind is None else privacy.secret(folder / "secret")
    authority = (kit / "rootCA.pem").read_bytes()
    return masked.Masks(terms, name, identity, authority, journal, secret)


class HisoController(Controller):
    """The server of a job: rounds of `hiso_jax.federation.Host` over NVFlare's tasks.

    Ledger, snapshots and the log of the rounds are in a folder that outlives the job; a job that
    is submitted again goes on where its ledger ends.
    """

    def __init__(self, task_check_period: float = 0.05):
        super().__init__(task_check_period=task_check_period)
        self._tasks: list[Task] = []
        self._host: Host | None = None
        self._context: Any = None
        self._wire = Wire()

    # What NVFlare calls.

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing: all is done in the flow, whose errors are the job's."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing: the flow has closed what it opened."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Go through the rounds that the ledger lacks, then bring everybody to the end."""
        self._context = fl_ctx
        try:
            plan, local = _opened(fl_ctx, None)
            with folders.alone(local.folder):
                self._run(plan, local.folder, plan.make(local), abort_signal)
        except Exception as error:
            # The text is for the one who submitted it; it names arguments, and no data is here.
            self.log_exception(fl_ctx, f"the job ends: {error}")
            self.system_panic(f"{type(error).__name__}: {error}", fl_ctx)

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """A reply whose round is closed: it is counted and changes nothing."""
        if self._host is not None:
            self._host.receive(client.name, result.get(MESSAGE), late=True)

    # The rounds.

    def _run(self, plan: Plan, folder: Path, party: Party, abort: Signal) -> None:
        path, algorithm, state = folder / "ledger.sqlite", party.algorithm, party.begin()
        if path.exists():
            ledger = Ledger.open(path, algorithm, state)
        else:
            ledger = Ledger.create(path, algorithm, state, party.about, plan.privacy)
        with ledger:
            base = digests.digest(state)
            state = snapshots.restore(folder / "snapshots", algorithm, state, ledger)
            host = self._host = self._begin(plan, folder, algorithm, state, ledger, base)
            server = host.server
            del state
            self._say(f"{ledger.rounds} of {plan.rounds} rounds are in {path}")
            lines = notes.Notes(folder / "rounds.jsonl", server.round)
            with self._spared("rounds.jsonl"):
                lines.write()
            empty, spent, said = 0, "", ""
            while server.round < plan.rounds and empty < plan.most_empty:
                asked = plan.draw(server.round)
                try:
                    closed = self._round(host, plan, asked, abort)
                except privacy.BudgetSpent as error:
                    self._say(spent := f"after {server.round} rounds: {error}")
                    break
                self._cancel()
                if closed is None:
                    self._say("aborted; what was recorded is safe: submit the job again")
                    return
                void = getattr(host, "void", "")  # of a host of masked rounds only
                row = notes.row_of(closed, asked, plan.needed, void)
                said = notes.told(row)
                with self._spared(f"line of round {closed.round}"):
                    self._note(lines, host, plan, row)
                if server.round % plan.snapshot_every == 0 or server.round == plan.rounds:
                    with self._spared(f"snapshot after round {closed.round}"):
                        snapshots.save(folder / "snapshots", algorithm, server.state)
                empty = 0 if closed.reported else empty + 1
            if server.round < plan.rounds and not spent:
                raise RuntimeError(
                    f"nobody counted in the last {empty} rounds; in the last one: {said}. "
                    "Submit the job again when sites can answer"
                )
            self._finish(host, plan, folder, party, abort, spent)

    def _begin(
        self, plan: Plan, folder: Path, algorithm: Algorithm, state: Any, ledger: Ledger, base: Any
    ) -> Host:
        """The host of a run, which sees sums only if that is what the job promises.

        Raises:
          ValueError: the ledger of this name promises something else.
        """
        if ledger.header.get("privacy") != plan.privacy:
            raise ValueError(
                f"--name: the run {plan.name} promises {ledger.header.get('privacy')} of privacy, "
                f"the job {plan.privacy}; give the job another name"
            )
        if (terms := plan.terms) is None:
            return Host(federation.Server(algorithm, state, ledger), self._send, base=base)
        from hiso_jax.federation import masked, private  # needs the extra `secure`

        secret = privacy.secret(folder / "secret") if terms.kind == "central" else None
        server = private.PrivateServer(algorithm, state, ledger, secret=secret, directory={})
        if not terms.masked:
            return Host(server, self._send, base=base)
        authority = (_kit(self._context) / "rootCA.pem").read_bytes()
        return masked.MaskedHost(server, self._send, authority, base, plan.threshold,
                                 patience=plan.step_deadline)  # fmt: skip

    def _round(self, host: Host, plan: Plan, names: list[str], abort: Signal) -> Closed | None:
        stop = lambda: bool(abort.triggered)  # noqa: E731
        number, begin = host.server.round, time.monotonic()
        while not stop():
            try:
                if host.server.asked:  # it is open, and lacks nothing but its record
                    return host.close(plan.min_responses, number, begin)
                return host.conduct(
                    names, plan.deadline, plan.min_responses, plan.grace, stop, self._is_gone
                )
            except LedgerWriteError as error:
                self._say(f"round {number} is kept until it can be recorded: {error}")
                time.sleep(LOOK_AGAIN)
        return None

    def _finish(
        self, host: Host, plan: Plan, folder: Path, party: Party, abort: Signal, spent: str
    ) -> None:
        server = host.server
        stop = lambda: bool(abort.triggered)  # noqa: E731
        there = host.end(plan.sites, plan.deadline, stop, self._is_gone)
        self._cancel()
        server.ledger.export(folder / "ledger.safetensors")
        party.finish(folder, server.state)
        up, down = self._wire.look()
        result = {
            "rounds": server.round,
            "digest": digests.text(digests.digest(server.state)),
            "held_by": there,
            "not_there": {n: host.faults.get(n, "silent") for n in plan.sites if n not in there},
            "bytes": {name: count._asdict() for name, count in sorted(host.counts.items())},
            "wire_bytes_sent": up,
            "wire_bytes_received": down,
            **({"stopped": spent} if spent else {}),
        }
        with files.atomic_write(folder / "result.json") as part:
            part.write_text(json.dumps(result, indent=2) + "\n")
        self._say(f"{server.round} rounds, digest {result['digest']}, held by {', '.join(there)}")

    def _note(self, lines: notes.Notes, host: Host, plan: Plan, row: dict[str, Any]) -> None:
        """One line for the log, one for ``rounds.jsonl``: who answered, and what it cost."""
        counts = zip(Count(), *host.counts.values(), strict=True)
        (up, down, *messages), wire = [sum(each) for each in counts][:4], self._wire.look()
        self._say(
            f"round {row['round'] + 1}/{plan.rounds}: {notes.told(row)}; {row['seconds']:.2f} s, "
            f"payload up {up} B down {down} B, wire {sum(wire)} B"
        )
        lines.add(row, (up, down, *messages, *wire))

    @contextlib.contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """Say what a full disk costs beside the round, which is recorded."""
        try:
            yield
        except OSError as error:
            self._say(f"{what}: {error}")

    # NVFlare.

    def _send(self, name: str, message: bytes) -> None:
        data = Shareable()
        data[MESSAGE] = message
        task = Task(name=TASK, data=data, result_received_cb=self._received)
        self._tasks.append(task)
        self.broadcast(task, self._context, targets=[name], min_responses=1)

    def _received(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        result: Any = client_task.result
        name = client_task.client.name
        client_task.result = None  # whatever its size, it is not kept
        if self._host is None:
            return
        code = result.get_return_code() if isinstance(result, Shareable) else "no reply"
        if code == ReturnCode.OK:
            self._host.receive(name, result.get(MESSAGE))
        else:
            self._host.fail(name, f"NVFlare says {code}; the log of its job says more")

    def _is_gone(self, name: str) -> bool:
        """Whether NVFlare knows that the client's job process has died."""
        return bool(self.get_client_disconnect_time(name))

    def _cancel(self) -> None:
        for task in self._tasks:
            if task.completion_status is None:
                self.cancel_task(task)
        self._tasks.clear()

    def _say(self, text: str) -> None:
        self.log_info(self._context, text)


class HisoExecutor(Executor):
    """A site of a job: `hiso_jax.federation.Site` with what NVFlare brings it."""

    def __init__(self) -> None:
        super().__init__()
        self._site: federation.Site | None = None
        self._held = contextlib.ExitStack()  # the folder, which one process at a time works in
        self._wire = Wire()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Read model and data before the first task comes; say at the end what was sent."""
        if event_type == EventType.START_RUN:
            try:
                self._begin(fl_ctx, WAIT_FOR_FOLDER)
            except Exception:  # said again, to the server too, when a task comes
                self.log_exception(fl_ctx, "this site cannot take part")
        elif event_type == EventType.ABOUT_TO_END_RUN:
            up, down = self._wire.look()
            self.log_info(fl_ctx, f"wire: {up} B sent, {down} B received by this job's process")
        elif event_type == EventType.END_RUN:
            self._held.close()

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answer one message."""
        message = shareable.get(MESSAGE)
        if task_name != TASK or not isinstance(message, bytes):
            self.log_error(fl_ctx, f"task {task_name!r} is none of hiso_jax")
            return make_reply(ReturnCode.BAD_TASK_DATA)
        try:
            answer = self._begin(fl_ctx).answer(message)
        except wire.WireError as error:
            self.log_error(fl_ctx, f"what the server sends is no message: {error}")
            return make_reply(ReturnCode.BAD_TASK_DATA)
        except Exception as error:
            self.log_exception(fl_ctx, "this site cannot take part")
            # Its kind only: the text may hold data, and stays in this site's log.
            failed = wire.Failed(wire.round_of(message), type(error).__name__)
            answer = wire.pack(failed, wire.run_of(message) or bytes(8))
        reply = make_reply(ReturnCode.OK)
        reply[MESSAGE] = answer
        return reply

    def _begin(self, fl_ctx: FLContext, patience: float = 0.0) -> federation.Site:
        if self._site is None:
            name = str(fl_ctx.get_identity_name())
            plan, local = _opened(fl_ctx, name)
            with contextlib.ExitStack() as stack:  # what fails here lets the folder go again
                stack.enter_context(folders.alone(local.folder, patience))
                self._site = self._made(plan, local, name, _kit(fl_ctx))
                self._held = stack.pop_all()
            self.log_info(fl_ctx, f"at round {self._site.round} of run {self._site.run.hex()}")
        return self._site

    def _made(self, plan: Plan, local: Local, name: str, kit: Path) -> federation.Site:
        party, number = plan.make(local), plan.number_of(name)
        if party.batches is None:
            raise ValueError(f"--party: {plan.party} gives no batches at a site")
        batches = party.batches
        return federation.Site(
            party.algorithm,
            party.begin,
            lambda round: batches(round, number),
            local.folder / "snapshots",
            plan.snapshot_every,
            lambda state: self._keep(party, local.folder, state),
            _promised(plan, local.folder, name, kit),
        )

    def _keep(self, party: Party, folder: Path, state: Any) -> None:
        party.finish(folder, state)
        digest = digests.text(np.asarray(digests.digest(state)))
        with files.atomic_write(folder / "result.json") as part:
            part.write_text(json.dumps({"rounds": int(state.round), "digest": digest}) + "\n")
