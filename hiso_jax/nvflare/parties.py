"""What a machine works with: the job that everybody has, and what only this machine knows.

A job is plain data and has no path in it. Where a site's examples are, where the model is and
where to keep what must outlive a job is the machine's own: a file ``hiso.json`` beside its
configuration, which is never sent.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hiso_jax import federation, secure
from hiso_jax._engine import checks
from hiso_jax.privacy import Terms
from hiso_jax.protocol import Algorithm, State

VARIABLE = "HISO_LOCAL"
"""Environment variable: the file with a machine's own settings, if it is elsewhere."""
FILE = "hiso.json"
TASK = "hiso"
"""Name of NVFlare's tasks."""
PLAN = "hiso_plan.json"
"""The job's own file, beside NVFlare's."""


class Local(NamedTuple):
    """What only one machine knows.

    Attributes:
      folder: where ledger, snapshots and models are kept; outlives jobs.
      site: name of the site; None: the server, which has no data.
      data: file or folder of the site's examples.
      model: folder, GGUF file or hub id of the base model, where it is not the job's ``--model``.
      functions: ``module:function`` that a job may name here, apart from hiso_jax's own: nothing
        else that a job says is imported or called.
    """

    folder: Path
    site: str | None = None
    data: Path | None = None
    model: str | None = None
    functions: tuple[str, ...] = ()

    def check_function(self, name: str, option: str) -> None:
        """Raise PermissionError unless this machine lets jobs name a function."""
        if name not in self.functions:
            raise PermissionError(
                f"{option}: {name} is not among the functions that this machine lets a job name: "
                f"{list(self.functions)}; its own {FILE} says which, `hiso nvflare site` writes it"
            )


class Party(NamedTuple):
    """What a server or a site works with; one of your own is made by ``--party module:function``.

    Attributes:
      algorithm: the same at all parties.
      begin: gives the fresh state, the same at all parties.
      batches: ``(round, number) -> leaves [1, K, B, ...]`` of the site, which is so manieth among
        the sites; None at the server.
      finish: ``(folder, state)``, once after the last round: what to keep of it.
      about: for the ledger's header.
    """

    algorithm: Algorithm
    begin: Callable[[], State]
    batches: Callable[[int, int], Any] | None = None
    finish: Callable[[Path, State], Any] = lambda folder, state: None
    about: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the rounds of a job go; the same for any problem."""

    name: str
    sites: tuple[str, ...]
    rounds: int
    clients_per_round: int
    seed: int = 0
    deadline: float = 600.0
    min_responses: int = 1
    grace: float | None = None
    most_empty: int = 5
    snapshot_every: int = 50
    sampling: str = "uniform"
    privacy: dict[str, Any] | None = None
    threshold: int = 0
    step_deadline: float = 60.0
    party: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take a list for a tuple, as JSON has it.

        Raises:
          TypeError, ValueError: a field is out of range; the message names it.
        """
        object.__setattr__(self, "sites", tuple(checks.clients("--sites", self.sites)))
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\\0"):
            raise ValueError(f"--name: expected the name of a folder, got {self.name!r}")
        for field in ("rounds", "clients_per_round", "min_responses", "most_empty",
                      "snapshot_every"):  # fmt: skip
            checks.count(f"--{field.replace('_', '-')}", getattr(self, field))
        checks.choice("--sampling", self.sampling, ("uniform", "balanced"))
        for field in ("deadline", "step_deadline"):
            checks.number(f"--{field.replace('_', '-')}", getattr(self, field), 0, above=True)
        if self.grace is not None:
            checks.number("--grace", self.grace, 0)
        for field, most in (("clients_per_round", len(self.sites)),
                            ("min_responses", self.clients_per_round)):  # fmt: skip
            if getattr(self, field) > most:
                raise ValueError(f"--{field.replace('_', '-')}: expected at most {most}, for of "
                                 f"{len(self.sites)} sites {self.clients_per_round} are asked a "
                                 f"round; got {getattr(self, field)}")  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan that `write` wrote.

        Raises:
          ValueError: it is none.
        """
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the plan of a job: {error}") from None

    def text(self) -> str:
        """The plan as JSON, for `read`."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    def number_of(self, site: str) -> int:
        """Number of a site among all.

        Raises:
          ValueError: it is none of the job's.
        """
        if site not in self.sites:
            raise ValueError(
                f"--sites: {site!r} is none of {list(self.sites)}, which the job names"
            )
        return self.sites.index(site)

    def draw(self, round: int) -> list[str]:
        """Who is asked in a round."""
        balanced = self.sampling == "balanced"
        return federation.draw(
            self.sites, self.clients_per_round, round, self.seed, balanced=balanced
        )

    @property
    def terms(self) -> Terms | None:
        """What the job promises of privacy; None: nothing."""
        return None if self.privacy is None else Terms.from_config(self.privacy)

    @property
    def needed(self) -> int:
        """So many must answer, or else the round is void."""
        if (terms := self.terms) is None or not terms.masked:
            return self.min_responses
        least = self.threshold or terms.least or secure.two_thirds(self.clients_per_round)
        return max(least, self.min_responses)

    def make(self, local: Local) -> Party:
        """What this machine works with.

        Raises:
          PermissionError: the job names a function that this machine does not let it name.
        """
        if self.party is None:
            return finetune(self.options, local)
        from hiso_jax.train import methods  # which knows data sets and plots: not for any party

        local.check_function(self.party, "--party")
        return methods.imported(self.party, "--party: expected")(self.options, local)


def read_local(configuration: Path, folder: Path, site: str | None) -> Local:
    """What a machine's own file says.

    Args:
      configuration: folder that the file is in, unless the variable HISO_LOCAL names another;
        ``{site}`` in that stands for the site's name.
      folder: where to keep things, unless the file names another.
      site: name of the site; None for the server, which needs no file.

    Raises:
      ValueError: the file is none, or has names in it that are not known.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> _ = (folder / "hiso.json").write_text('{"data": "/data/reviews.csv"}')
      >>> read_local(folder, Path("kept"), "ward-7").data
      PosixPath('/data/reviews.csv')
    """
    named = os.environ.get(VARIABLE)
    path = Path(named.replace("{site}", site or "server")) if named else configuration / FILE
    known = {k for k in Local._fields if k != "site"}
    if not path.is_file():
        if named:
            raise ValueError(f"{VARIABLE}: {path}: no such file")
        return Local(folder, site)
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected an object in JSON: {error}") from None
    if not isinstance(found, dict) or found.keys() - known:
        given = sorted(found.keys() - known) if isinstance(found, dict) else found
        raise ValueError(f"{path}: expected an object with any of {sorted(known)}, got {given}")
    functions = found.pop("functions", [])
    if not isinstance(functions, list) or not all(isinstance(f, str) for f in functions):
        raise ValueError(f"{path}: functions: expected a list of texts, got {functions!r}")
    for name, value in found.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{path}: {name}: expected a text, got {value!r}")
    data, model = found.get("data"), found.get("model")
    kept = Path(found["folder"]) if "folder" in found else folder
    return Local(kept, site, None if data is None else Path(data), model, tuple(functions))


def finetune(given: Mapping[str, Any], local: Local) -> Party:
    """The party of ``hiso finetune``: a text task on a pretrained model.

    Args:
      given: options of `hiso_jax.nvflare.job.Options` by name, and ``labels``.
      local: of this machine; a site needs ``data``.

    Raises:
      ValueError: the site has no data in its own file; or what is wrong with data and model.
      PermissionError: the method is a function that this machine does not let jobs name.
    """
    from hiso_jax.tasks import data
    from hiso_jax.train import finetune as job
    from hiso_jax.train import job as jobs
    from hiso_jax.train import methods, resume, settings

    if local.site is not None and local.data is None:
        raise ValueError(f"data: needed in this site's own {FILE}: the file or folder with the "
                         "examples")  # fmt: skip
    labels = given.get("labels") or None
    own = settings.restored(job.Options, dict(given))
    own |= {"data": local.data or Path("data"), "split": "iid", "clients": 1}
    own["model"] = local.model or own.get("model")
    options = job.Options(**own)
    if ":" in (method := methods.parse(options.method)[0]):
        local.check_function(method, "--method")
    rows = data.made_up if local.site is None else None  # the server has none
    problem = job.build(options, labels, rows).at_most(options.eval_examples)
    (rate,) = jobs.rates_of(options, job.LEARNING_RATES).values()
    algorithm: Any = jobs.algorithm(options, problem, rate)
    name = problem.clients.names[0]

    def begin() -> State:
        params = jax.tree.map(jnp.asarray, problem.params)
        return algorithm.init(params, resume.root_key(options))

    def batches(round: int, number: int) -> Any:
        size, steps = options.batch_size, options.local_steps
        drawn = problem.clients.batches([name], round, size, steps, options.seed, number)
        return problem.prepare(drawn)

    def finish(folder: Path, state: State) -> None:
        problem.save(folder, state.params)
        _describe(folder, problem, options, rate, counted=local.site is not None)
        if local.site is not None:
            _measure(folder, problem, state)

    about: dict[str, Any] = {"task": options.task}
    about |= {} if problem.adapter is None else {"train": problem.adapter}
    site = local.site is not None
    return Party(algorithm, begin, batches if site else None, finish, about)


def _describe(folder: Path, problem: Any, options: Any, rate: float, counted: bool) -> None:
    """Write what `hiso predict` reads beside the model: options, and labels with their words.

    Args:
      folder: with the model.
      problem, options, rate: of the run.
      counted: whether the problem's examples are real; the server's are made up.
    """
    from hiso_jax.train import report, settings

    # Of no job that can be resumed or watched here.
    rates, job = {options.method: rate}, {"job": "nvflare"}
    settings.write(dataclasses.replace(options, out=folder), rates, job)
    rows = report.counts(problem)
    named = [{name: row[name] for name in ("label", "word")} for row in rows]
    report.write_json(folder / "labels.json", rows if counted else named)


def _measure(folder: Path, problem: Any, state: State) -> None:
    """Write what the model is worth on the site's own dev and test, before and after."""
    from hiso_jax.train import measure, report

    with report.progress() as bar:
        score = jax.jit(problem.score)
        found = {
            f"{split}_{what}": dict(zip(("loss", problem.metric), values, strict=True))
            for split in ("dev", "test")
            for what, params in (("before", problem.params), ("after", state.params))
            for values in [measure.evaluate(problem, score, params, split, bar)[0]]
        }
    report.write_json(folder / "measured.json", found)
