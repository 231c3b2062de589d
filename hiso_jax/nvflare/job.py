"""``hiso nvflare job``: the job that NVFlare is given, from the options of ``hiso finetune``."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from hiso_jax import secure
from hiso_jax._engine import files
from hiso_jax.nvflare import machine, session
from hiso_jax.nvflare.parties import PLAN, TASK, Plan
from hiso_jax.train import cli as commands
from hiso_jax.train import finetune, job, methods, promised, report, settings

INTERVAL = 0.05
"""Seconds between looks for a task; NVFlare's own, 2, are most of a round."""
OF_A_SITE = ("data",)
OF_A_SIMULATION = ("compare", "resume", "mesh", "distributed", "split", "clients", "alpha",
                   "client_column", "dropout", "answers", "log", "select", "budget", "renew",
                   "eval_every")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options(finetune.Options):
    """Write the job for a run of real clients: as hiso finetune, but each site has its own data.

    A site keeps where its data are, and its copy of the model, in local/hiso.json of its own
    NVFlare folder: {"data": "/data/reviews.csv", "model": "/models/opt-125m"}. docs/deploy.md
    goes from nothing to a running job. Of hiso finetune's options --data is refused here, for it
    belongs to a site, and those of a simulation are: --clients, --split, --alpha,
    --client-column, --dropout, --select, --budget, --renew, --compare, --resume, --mesh,
    --distributed, --eval-every, --answers, --log.
    """

    out: Path = Path("runs/nvflare-job")
    """Folder of the job, which must not be there."""
    name: str = "hiso"
    """Of the run: jobs of one name go on with one ledger."""
    sites: tuple[str, ...] = ("site-1", "site-2", "site-3")
    """Names of the sites, as they were provisioned; their order counts."""
    labels: tuple[str, ...] = ()
    """Values of the label, for a site may lack some; needed for classes of your own."""
    clients_per_round: int = 3
    """Sites asked a round (C)."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Which sites take part: all alike, or in turns, which costs the least of a budget."""
    threshold: int = 0
    """With --secure, fewest sites that a sum is revealed of, and shares that unmask one: more than
    half of those asked; 0 for more than two thirds. With fewer a round is void."""
    step_deadline: float = 60.0
    """With --secure, seconds that each of the four steps after measuring waits for a site."""
    deadline: float = 600.0
    """Seconds after which a round closes with who has answered; the first compiles."""
    min_responses: int = 1
    """Sites that must answer: the round of fewer moves nothing."""
    grace: float | None = None
    """Seconds that a round waits for others once so many have answered; by default the deadline."""
    most_empty: int = 5
    """Rounds in a row that nobody counts in, after which the job ends; submit it again."""
    party: str | None = None
    """module:function of yours, for a problem of your own: installed, and allowed, everywhere."""


OF_THE_PLAN = {field.name for field in dataclasses.fields(Plan)}


def check(options: Options) -> Plan:
    """Return the plan of a job whose options are in their ranges and fit together.

    Raises:
      ValueError: they are not; or one belongs to a site, or to a simulation. It is named.

    Example:
      >>> check(Options(data=Path("mine.csv")))
      Traceback (most recent call last):
          ...
      ValueError: --data: each site's own, in its local/hiso.json; it is in no job
    """
    default, spell = Options(), lambda name: f"--{name.replace('_', '-')}"
    for name in OF_A_SITE:
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"{spell(name)}: each site's own, in its local/hiso.json; it is in "
                             "no job")  # fmt: skip
    for name in OF_A_SIMULATION:
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"{spell(name)}: for simulations only; here each site is one client "
                             "with its own data")  # fmt: skip
    if options.sampling not in ("uniform", "balanced"):
        raise ValueError(f"--sampling: expected uniform or balanced, got {options.sampling!r}: the "
                         "server does not know how many examples a site has")  # fmt: skip
    settings.check(options)
    if options.threshold and not options.secure:
        raise ValueError(f"--threshold: of masked rounds, which need --secure, got "
                         f"{options.threshold}")  # fmt: skip
    if options.secure and options.threshold:
        secure.Session("run", 0, options.sites[: options.clients_per_round], 1, options.threshold)
    if options.party is not None and not all(options.party.partition(":")):
        raise ValueError(f"--party: expected module:function, got {options.party!r}")
    if options.party is None:
        # With the data of some site, which are none of the server's.
        whole = dataclasses.replace(options, data=Path("data"))
        task = finetune.task_of(whole)
        known = task.values or (range(len(task.verbalizer or ())) if task.hub else ())
        if task.is_class and not known and not options.labels:
            raise ValueError(f"--labels: needed, the values of column {task.label!r} at all sites")
        if options.labels and (task.hub or not task.is_class):
            raise ValueError(f"--labels: --task {options.task} has its own; leave them out")
        if len(set(options.labels)) != len(options.labels) or len(options.labels) == 1:
            raise ValueError(f"--labels: expected two or more, all different, got {options.labels}")
        if methods.sends_models(methods.check(options.method)):
            raise ValueError(f"--method: expected one whose clients send scalars, got "
                             f"{options.method!r}, which sends models")  # fmt: skip
        job.rates_of(options, finetune.LEARNING_RATES)
    known = {field.name for field in dataclasses.fields(finetune.Options)} | {"labels"}
    left_out = {"out", *OF_A_SITE, *OF_A_SIMULATION}
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k in known - left_out}
    values = {k: getattr(options, k) for k in OF_THE_PLAN - {"options", "privacy"}}
    plan = Plan(**values, options=json.loads(report.dumps(kept)))
    terms = promised.terms(options, map(plan.draw, range(plan.rounds)), options.threshold)
    return plan if terms is None else dataclasses.replace(plan, privacy=terms.config)


def files_of(plan: Plan) -> dict[str, str]:
    """Files of the job by their place in its folder."""
    filters: dict[str, Any] = dict(task_data_filters=[], task_result_filters=[], components=[])
    engine = "hiso_jax.nvflare.engine"
    server = dict(
        format_version=2,
        server=dict(heart_beat_timeout=600, task_request_interval=INTERVAL),
        workflows=[dict(id=TASK, path=f"{engine}.HisoController",
                        args=dict(task_check_period=INTERVAL))],
        **filters,
    )  # fmt: skip
    client = dict(
        format_version=2,
        default_task_fetch_interval=INTERVAL,
        executors=[dict(tasks=[TASK], executor=dict(path=f"{engine}.HisoExecutor", args={}))],
        **filters,
    )
    meta = dict(
        name=plan.name,
        resource_spec={},
        deploy_map={"app": ["server", *plan.sites]},
        min_clients=plan.min_responses,
    )
    as_json = lambda content: json.dumps(content, indent=2) + "\n"  # noqa: E731
    return {
        "meta.json": as_json(meta),
        "app/config/config_fed_server.json": as_json(server),
        "app/config/config_fed_client.json": as_json(client),
        f"app/config/{PLAN}": plan.text(),
    }


def write(options: Options) -> Path:
    """Write a job's folder, whole or not at all; return it.

    Raises:
      FileExistsError: it is there.
      ValueError: an option is wrong.
    """
    plan = check(options)
    if options.out.exists():
        raise FileExistsError(f"--out: {options.out} exists; nothing is written over")
    with files.whole_folder(options.out) as part:
        for name, text in files_of(plan).items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text)
    return options.out


COMMANDS = {
    "site": "prepare a machine's startup kit: where its data are, what it lets jobs do",
    "job": "write a job of NVFlare, from the options of hiso finetune",
    "run": "submit a job, and again until all its rounds are done",
}


def cli() -> None:
    """Parse the command line; write a job, or prepare a machine."""
    import tyro

    more = "docs/deploy.md begins at the beginning."
    if (chosen := commands.choose("hiso nvflare", COMMANDS, more)) is None:
        return
    name, *rest = chosen
    sys.argv[0] = f"hiso nvflare {name}"
    if name == "site":
        machine_options = tyro.cli(machine.Options, args=rest)
        with report.door():
            for path in machine.prepare(machine_options):
                report.say("Written: ", str(path))
        return
    if name == "run":
        run_options = tyro.cli(session.Options, args=rest)
        with report.door():
            return session.cli(run_options)
    options = tyro.cli(Options, args=settings.modern(rest))
    with report.door():
        out = write(options)
    command = shlex.quote(str(out))
    report.say("Written to ", f"{out}/", ". To run it: hiso nvflare run ", command, " KIT")
