"""The options of every job, and how a run is gone on with by those it was started with."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import jax

from hiso_jax import directions
from hiso_jax._engine import checks, extras
from hiso_jax.tasks.data import check_text
from hiso_jax.train import logs, report, selecting
from hiso_jax.train.report import console

COMPARED = ("hiso", "decomfl")
"""Methods that --compare runs."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every job."""

    method: str = "hiso"
    """The algorithm to run: hiso, decomfl, rms, mezo, meazo, fzoo, hizoo, momentum, adam, fedkseed;
    fedavg, fedadam, fedyogi, fedadagrad, fedzo, which send models; or module:function of yours.
    Arguments go in parentheses: "rms(decay=0.9)"."""
    compare: bool = False
    """Run HiSo and DeComFL on the same seeds and draw both curves."""
    rounds: int = 200
    """Communication rounds."""
    out: Path = Path("runs/job")
    """Folder of the run; one that is there is moved aside, to a name with a number."""
    resume: Path | None = None
    """Go on with the run in this folder, with the options it was started with."""
    seed: int = 0
    """Seed of the noise, of who takes part and of the batches; for texts of your own also of how
    they are split over clients, which `hiso compare` splits alike for all seeds."""
    learning_rate: float | None = None
    """Peak learning rate, falling linearly to 0; by default the one that was tuned for the method
    on the job's own model and data, if one was."""
    clients_per_round: int = 8
    """Clients sampled a round (C)."""
    sampling: Literal["uniform", "size", "balanced"] = "uniform"
    """Which clients take part: all alike, in proportion to their examples, or in turns."""
    dropout: float = 0.0
    """Chance that a sampled client does not answer."""
    secure: bool = False
    """Scalars are masked: the server sees the sum of a round only (extra secure)."""
    epsilon: float | None = None
    """Budget of the client that is asked most, for all its data (extra dp): noise on the sum of a
    round, by the server, or, with --secure, of all clients together under their masks."""
    delta: float = 1e-5
    """Of (epsilon, delta)-differential privacy."""
    clip: float | None = None
    """Largest norm of a client's scalars of a round; needed with --epsilon."""
    batch_size: int = 4
    """Examples of a client in a local step."""
    select: str | None = None
    """Which of its examples a client learns from: uniform, balanced, k_center, k_means, active_ft,
    vecaf, loss, entropy, margin, el2n, importance, or "vecaf(eta=0.2)"; by default from all."""
    budget: float = 0.1
    """Share of its examples that --select keeps."""
    renew: int = 20
    """Rounds between choices of --select, each a look at all examples of a client."""
    local_steps: int = 1
    """Local steps of a client (K)."""
    num_perturbations: int = 5
    """Scalars a local step (P); an update costs P + 1 forward passes."""
    per_client_directions: bool = False
    """Every client has directions of its own: more for the server to average, no more to do."""
    upper_directions: tuple[int, ...] | Literal["auto"] = ()
    """Of the scalars of a local step, so many along directions that move the upper layers only,
    whose passes start from the activations below them; several numbers for several depths. auto:
    a look before the run tells how many of which, for the forward passes of P others."""
    upper_layers: tuple[int, ...] = (1,)
    """How many layers those are; for several depths the deepest comes first."""
    smoothing: float = 1e-3
    """Finite-difference step (mu)."""
    estimator: Literal["forward", "central"] = "forward"
    """Differences: forward costs P + 1 forward passes, central 2 P."""
    decay: float = 0.95
    """Weight of the old curvature, of hiso; other rules take theirs as "rms(decay=0.9)"."""
    distribution: directions.Distribution = "rademacher"
    """Noise: normal is the paper's, near_normal and rademacher are cheaper."""
    eval_every: int = 25
    """Rounds between evaluations on the dev split."""
    eval_examples: int = 1000
    """Examples of dev, and of test, that are measured on at most; 0 for all."""
    snapshot_every: int = 50
    """Rounds between snapshots; a resumed run replays at most as many."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where rounds are written to beside metrics.jsonl; each needs its own package."""
    mesh: tuple[int, int] | None = None
    """Devices for clients, and for parts of the model: 8 1 has eight with the whole model."""
    distributed: str | None = None
    """Processes that train together: auto (TPU pods, clusters), or host:port,processes,number."""

    def __post_init__(self) -> None:
        """Take a number where there is one depth; 0 for none."""
        for name in ("upper_directions", "upper_layers"):
            if isinstance(value := getattr(self, name), int):
                object.__setattr__(self, name, (value,) if value else ())

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are run, one after the other."""
        return COMPARED if self.compare else (self.method,)


RENAMED = {
    "own_directions": "per_client_directions",
    "words": "verbalizer",
    "num_clients": "clients",
}
"""Options under the names that they had before 0.2."""


def modern(arguments: Sequence[str]) -> list[str]:
    """A command line with the options of today; those that have another name are told.

    Example:
      >>> modern(["--rounds", "3", "--no-own-directions"])
      Note: --no-own-directions is now called --no-per-client-directions
      ['--rounds', '3', '--no-per-client-directions']
    """
    spell = lambda name, no: f"--{no}{name}".replace("_", "-")  # noqa: E731
    known = {spell(a, no): spell(b, no) for a, b in RENAMED.items() for no in ("", "no-")}
    out = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if (new := known.get(name.replace("_", "-"))) is not None:
            report.say(f"Note: {name} is now called {new}", style="yellow")
            argument = new + equals + value
        out.append(argument)
    return out


def given(arguments: Sequence[str]) -> set[str]:
    """Names of the options on a command line, also of those that are given their defaults.

    Example:
      >>> sorted(given(["--rounds", "3", "--no-secure", "--batch-size=4", "-1", "x"]))
      ['batch_size', 'rounds', 'secure']
    """
    named = (x[2:].partition("=")[0].replace("-", "_") for x in arguments if x.startswith("--"))
    return {name.removeprefix("no_") for name in named}


def renamed(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they were written down, under the names of today.

    Example:
      >>> renamed({"own_directions": True, "rounds": 3})
      {'per_client_directions': True, 'rounds': 3}
    """
    return {RENAMED.get(name, name): value for name, value in options.items()}


OWN = ("out", "resume", "distributed")  # of a process, not of the run
MOVABLE = ("data", "model")  # may be elsewhere when a run goes on; their content is compared
SomeOptions = TypeVar("SomeOptions", bound=Options)


def settle(options: SomeOptions, named: Collection[str] = ()) -> SomeOptions:
    """Return the options of the run to resume, if one is; else those given.

    Args:
      options: as they were given.
      named: which of them were given on the command line, whatever their values.

    Raises:
      SystemExit: there is no run to resume, it is of another job, or other options are given.
    """
    options = _join(options)
    if options.resume is None:
        return options
    kind = type(options)
    ours = dataclasses.asdict(options) | {"resume": None, "distributed": None}
    ours["out"] = kind().out if jax.process_index() else options.out
    own = {"resume", "distributed"} | ({"out"} if jax.process_index() else set())
    changed = {
        k: v for k, v in ours.items() if v != getattr(kind(), k) or (k in named and k not in own)
    }
    if others := changed.keys() - set(MOVABLE):
        names = ", ".join(f"--{k.replace('_', '-')}" for k in changed if k in others)
        sys.exit(f"--resume takes all options from the run; {names} cannot be given with it")
    saved = read(options.resume)
    if saved["job"] != job_of(options):
        sys.exit(f"{options.resume} is a run of `hiso {saved['job']}`")
    kept: dict[str, Any] = restored(kind, saved["options"]) | changed
    return kind(**kept, out=options.resume, resume=options.resume)


def restored(kind: type[Options], saved: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, as JSON has them, in the types of a job's."""
    hints = get_type_hints(kind)
    return {name: typed(hint, saved[name]) for name, hint in hints.items() if name in saved}


def read(folder: Path) -> dict[str, Any]:
    """What `write` left in a run's folder.

    Raises:
      SystemExit: there is no run, or the file is not as it was written.
    """
    path = folder / "options.json"
    if not path.is_file():
        sys.exit(f"{path} is not there: no run to resume; start it without --resume")
    try:
        saved = json.loads(path.read_text())
        _ = saved["job"], saved["learning_rates"]
        saved["options"] = renamed(saved["options"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        sys.exit(f"{path}: not the options of a run: {error!r}")
    return saved


def write(
    options: Options, rates: dict[str, float], made_of: dict[str, str], seen: Any = None
) -> None:
    """Write down what `settle` needs, before anything is computed.

    Args:
      options: of the run; paths are kept as absolute ones.
      rates: peak learning rate by method.
      made_of: digests of the clients' data and of the base model.
      seen: what `read` gave, if it is there: the file is left alone if nothing has changed.
    """
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in OWN}
    for name in MOVABLE:  # a model may also be the name of one on the hub
        if kept.get(name) is not None and os.path.exists(kept[name]):
            kept[name] = os.path.abspath(kept[name])
    for name, value in kept.items():  # JSON has no infinity, which some take
        if isinstance(value, float) and not math.isfinite(value):
            kept[name] = str(value)
    content = {"job": job_of(options), "options": kept, "learning_rates": rates, **made_of}
    if json.loads(report.dumps(content)) != seen:
        report.write_json(options.out / "options.json", content)


def _join(options: SomeOptions) -> SomeOptions:
    """Join the other processes, if there are any."""
    if options.distributed is None:
        return options
    host, *numbers = options.distributed.split(",")
    if host != "auto" and not (len(numbers) == 2 and "".join(numbers).isdecimal()):
        sys.exit("--distributed: expected auto or host:port,processes,number, got "
                 f"{options.distributed}")  # fmt: skip
    jax.distributed.initialize(*([] if host == "auto" else [host, *map(int, numbers)]))
    if number := jax.process_index():
        console.quiet = True  # the first speaks for all
        own = lambda path: path and path.with_name(f"{path.name}.process{number}")  # noqa: E731
        options = dataclasses.replace(options, out=own(options.out), resume=own(options.resume))
    return options


def typed(hint: Any, value: Any) -> Any:
    """An option as JSON has it, back in the type that it had."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and float in (hint, *get_args(hint)):
        return float(value)
    return Path(value) if isinstance(value, str) and Path in (hint, *get_args(hint)) else value


def job_of(options: Options) -> str:
    """Name of the module that a job's options are of."""
    return Path(sys.modules[type(options).__module__].__file__ or "").stem


COUNTS = ("rounds", "clients_per_round", "batch_size", "local_steps", "num_perturbations",
          "eval_every", "snapshot_every")  # fmt: skip


def check(options: Options) -> None:
    """Raise unless the options are in their ranges; the message names the option."""
    name = lambda field: f"--{field.replace('_', '-')}"  # noqa: E731
    for field in COUNTS:
        if checks.count(name(field), getattr(options, field)) >= 2**31:
            raise ValueError(
                f"{name(field)}: expected less than 2^31, got {getattr(options, field)}"
            )
    clients, steps = options.clients_per_round, options.local_steps
    if clients * steps * options.batch_size > 2**26:
        raise ValueError(f"--batch-size: {options.batch_size} examples for {steps} local steps of "
                         f"{clients} clients are more than 2^26 a round")  # fmt: skip
    checks.number("--seed", options.seed, 0, 2**32 - 1)
    checks.number("--dropout", options.dropout, 0, 1)
    checks.number("--eval-examples", options.eval_examples, 0, 2**31 - 1)
    checks.number("--smoothing", options.smoothing, 1e-30, 1e30)
    checks.number("--decay", options.decay, 0, 1)
    _check_upper(options)
    _check_private(options)
    selecting.check(options)
    if options.learning_rate is not None:
        checks.number("--learning-rate", options.learning_rate, 0, 1e38)
    if options.compare and options.method != Options.method:
        raise ValueError(f"--method: --compare runs HiSo and DeComFL, got {options.method}")
    logs.check(options.log)
    for size in options.mesh or ():
        checks.count("--mesh", size)


def check_out(options: Options) -> None:
    """Raise unless the run's folder is its own: what is in it may be moved aside.

    Raises:
      ValueError: it is not; or a path is no text, for it was written in bytes that are not UTF-8.
    """
    out = options.out.resolve()
    if out == Path().resolve():
        raise ValueError(f"--out: expected a folder of its own, got {str(options.out)!r}")
    for name in ("out", *MOVABLE):
        check_text(f"--{name}", str(getattr(options, name, "")))  # pictures and pages have it
    for name in MOVABLE if options.resume is None else ():
        value = getattr(options, name, None)
        if value is not None and os.path.exists(value):  # a model may be on the hub
            path = Path(value).resolve()
            if out in (path, *path.parents):
                raise ValueError(f"--out: expected a folder of its own, got {options.out}, which "
                                 f"has what --{name} names, {value}")  # fmt: skip
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {options.out} is a file, expected a folder")


def check_clients(options: Options, count: int | None = None) -> None:
    """Raise unless there are as many clients as are asked in a round.

    Args:
      options: of the job.
      count: of clients; by default as many as the options make, if not the data tell.
    """
    if count is None:
        own: Any = options
        docstrings = getattr(own, "task", None) == "docstrings" and own.data is None
        if docstrings or getattr(own, "split", None) == "column":
            return
        count = int(getattr(own, "clients", options.clients_per_round))
    if options.clients_per_round > count >= 1:  # of fewer than one the job says more
        raise ValueError(f"--clients-per-round: expected at most {count}, for there are {count} "
                         f"clients; got {options.clients_per_round}")  # fmt: skip


def _check_upper(options: Options) -> None:
    """Raise unless as many depths have layers as have directions, the deepest first."""
    counts, layers = options.upper_directions, options.upper_layers
    if counts == "auto":
        if options.estimator != "forward":
            raise ValueError(f"--upper-directions: auto goes with --estimator forward, got "
                             f"{options.estimator}")  # fmt: skip
        return
    for name, values in (("--upper-directions", counts), ("--upper-layers", layers)):
        for value in values:
            checks.count(name, value)
    if sum(counts) > options.num_perturbations:
        raise ValueError(f"--upper-directions: expected at most --num-perturbations "
                         f"{options.num_perturbations} in all, got {counts}")  # fmt: skip
    if counts and len(counts) != len(layers):
        raise ValueError(f"--upper-layers: expected {len(counts)}, as many as --upper-directions, "
                         f"got {layers}")  # fmt: skip
    if any(below <= above for below, above in itertools.pairwise(layers)):
        raise ValueError(f"--upper-layers: expected the deepest first, got {layers}")


def _check_private(options: Options) -> None:
    """Raise unless rounds of these options can be masked, or given noise."""
    if options.clip is not None or options.epsilon is not None:
        for name in ("epsilon", "clip"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name}: needed, for --epsilon and --clip go together")
            checks.number(f"--{name}", getattr(options, name), 0, above=True)
        checks.number("--delta", options.delta, 0, 1, above=True, below=True)
        if options.upper_directions == "auto":
            raise ValueError("--upper-directions: auto looks at clients' data before a run, which "
                             "no noise hides; with --epsilon give numbers")  # fmt: skip
        if importlib.util.find_spec("dp_accounting") is None:
            raise ValueError(extras.needs("--epsilon", "dp-accounting", "dp"))
    if not options.secure:
        return
    if options.clients_per_round < 2:
        raise ValueError(f"--secure: the sum of one hides nothing; expected --clients-per-round of "
                         f"at least 2, got {options.clients_per_round}")  # fmt: skip
    if options.per_client_directions:
        raise ValueError("--secure: scalars of --per-client-directions are never added up")
    for package in ("cryptography", "Crypto"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(extras.needs("--secure", package, "secure"))
