"""The methods that --method names, and one of yours; each may have arguments in parentheses."""

import ast
import functools
import importlib
import inspect
import keyword
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

import hiso_jax as hj
from hiso_jax import algorithms, estimators, rules
from hiso_jax.federation import baselines
from hiso_jax.federation.baselines import Baseline
from hiso_jax.tasks.problem import Problem
from hiso_jax.train.work import multiplications


def _by_rule(make: Callable[..., rules.Rule], loss_fn: Any, rate: Any, **options: Any) -> Any:
    """The algorithm of a rule that has no function of its own; the rule's arguments go to it."""
    own = {n: options.pop(n) for n in inspect.signature(make).parameters if n in options}
    return hj.scalar_algorithm(loss_fn, rate, rule=make(**own), **options)


SCALAR: dict[str, Callable[..., hj.Algorithm]] = {
    "hiso": hj.federated_hiso,
    "decomfl": hj.decomfl,
    "rms": functools.partial(_by_rule, rules.rms),
    "mezo": hj.mezo,
    "meazo": hj.meazo,
    "fzoo": hj.fzoo,
    "hizoo": hj.hizoo,
    "momentum": functools.partial(_by_rule, rules.momentum),
    "adam": functools.partial(_by_rule, rules.adam),
    "fedkseed": hj.fedkseed,
}
"""Clients send scalars only."""

FIRST_ORDER = ("fedavg", *baselines.SERVERS)
OF_MODELS = (*FIRST_ORDER, "fedzo")
"""Clients send models."""
NAMES = (*SCALAR, *OF_MODELS)

TITLES = {
    "hiso": "HiSo", "decomfl": "DeComFL", "rms": "DeComFL / rms", "mezo": "MeZO",
    "meazo": "MEAZO", "fzoo": "FZOO", "hizoo": "HiZOO", "momentum": "ZO momentum",
    "adam": "ZO-Adam", "fedkseed": "FedKSeed", "fedavg": "FedAvg", "fedadam": "FedAdam",
    "fedyogi": "FedYogi", "fedadagrad": "FedAdagrad", "fedzo": "FedZO",
}  # fmt: skip
OWN = ", per-client directions"
"""Behind the name of a method that is run with them."""


def title(method: str) -> str:
    """A method as people write it.

    Example:
      >>> title("hiso(update_steps=all), per-client directions")
      'HiSo (update_steps=all), per-client directions'
    """
    name, comma, how = method.partition(", ")
    name, parenthesis, own = name.partition("(")
    shown = TITLES.get(name, name.rpartition(":")[2])
    return shown + f" ({own}" * bool(parenthesis) + comma + how


def parse(method: str) -> tuple[str, dict[str, Any]]:
    """The name of a method, and the arguments in parentheses: Python literals or bare words.

    Raises:
      ValueError: it is not written like a call with names.

    Example:
      >>> parse("hiso(update_steps=all, epsilon=1e-6)")
      ('hiso', {'update_steps': 'all', 'epsilon': 1e-06})
    """
    name, parenthesis, rest = method.strip().partition("(")
    if not parenthesis:
        return name, {}
    try:
        call: Any = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        own = {
            str(pair.arg): pair.value.id
            if isinstance(pair.value, ast.Name)
            else ast.literal_eval(pair.value)
            for pair in call.keywords
        }
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(
            f"--method: expected name or name(argument=value), got {method!r}"
        ) from None
    if len(own) < len(call.keywords):
        raise ValueError(f"--method: an argument is there twice in {method!r}")
    return name.strip(), own


def sends_models(method: str) -> bool:
    """Whether a method's clients send models, not scalars; its arguments do not matter.

    Example:
      >>> sends_models("fedadam(epsilon=1e-3)"), sends_models("hiso")
      (True, False)
    """
    return parse(method)[0] in OF_MODELS


def spelled(name: str, own: dict[str, Any]) -> str:
    """A method with its arguments, the one way that rows have it.

    Example:
      >>> spelled("hiso", {"update_steps": "all", "epsilon": 1e-6})
      'hiso(epsilon=1e-06,update_steps=all)'
    """

    def text(value: Any) -> str:
        if not isinstance(value, str):
            return repr(value).replace(", ", ",")
        return value if value.isidentifier() and not keyword.iskeyword(value) else repr(value)

    pairs = ",".join(f"{argument}={text(value)}" for argument, value in sorted(own.items()))
    return f"{name}({pairs})" if own else name


def check(method: str) -> str:
    """Return the method as rows have it, if there is one of that name that takes its arguments.

    Raises:
      ValueError: there is none; ``module:function`` cannot be imported; or it has an argument
        that the method lacks, or a value that it does not take.
    """
    name, own = parse(method)
    if name not in NAMES:
        _yours(name)
    if unknown := own.keys() - (known := _arguments(name)):
        if options := sorted(unknown & {*SHARED, *OPTIONAL.get(name, ())}):
            option = f"--{options[0].replace('_', '-')}"
            raise ValueError(f"--method: {options[0]} in {method!r} is an option: {option}")
        wanted = f"an argument out of {', '.join(sorted(known))}" if known else "no argument"
        raise ValueError(f"--method: expected {wanted} for {name}, got {sorted(unknown)[0]!r} "
                         f"in {method!r}")  # fmt: skip
    if own:  # nothing is computed: a look at the values
        try:
            _function(name)(lambda params, batch: 0.0, 0.0, **own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--method: {method!r}: {error}") from None
    return spelled(name, own)


SHARED = {
    "local_steps", "num_perturbations", "smoothing", "distribution", "estimator",
    "per_client_directions",
}  # fmt: skip
"""What every method is given by options of the job."""
OPTIONAL = {"hiso": ("decay",)}
"""What one of them is given too."""
_OF_SCALARS = (
    "num_perturbations", "smoothing", "distribution", "estimator", "per_client_directions",
    "upper_directions",
)  # fmt: skip
SETTLED = {
    "mezo": ("estimator", "num_perturbations", "local_steps"),
    "hizoo": ("estimator",),
    "fedzo": ("estimator", "per_client_directions", "upper_directions"),
} | dict.fromkeys(FIRST_ORDER, _OF_SCALARS)
"""Of those, what a method has its own of, or has no use for."""


def not_used(options: Any) -> list[str]:
    """Options that are not the job's defaults and that the method does not use, for a note."""
    (name, _), default = parse(options.method), type(options)()
    used = {x for other in options.methods for x in OPTIONAL.get(parse(other)[0], ())}
    others = [x for own in OPTIONAL.values() for x in own if x not in used]
    none = (*SETTLED.get(name, ()), *others)
    return [x for x in none if getattr(options, x) != getattr(default, x)]


def _function(name: str) -> Callable[..., Any]:
    """What builds the method: (loss_fn, learning_rate, **options)."""
    if name in FIRST_ORDER:
        return functools.partial(baselines.first_order, name)
    return baselines.fedzo if name == "fedzo" else SCALAR.get(name) or _yours(name)


def _arguments(name: str) -> set[str]:
    """What can stand in a method's parentheses."""
    if name == "fedavg":
        return set()  # its clients' rate is the rate
    function, found = _function(name), set()
    parts = (function.func, *function.args) if isinstance(function, functools.partial) else ()
    for part in filter(callable, parts or (function,)):
        for parameter in inspect.signature(part).parameters.values():
            rest = parameter.kind is inspect.Parameter.VAR_KEYWORD
            found |= set(algorithms.Options.__annotations__) if rest else {parameter.name}
    # Of the job, or nothing that can be written.
    found -= SHARED | {"name", "make", "loss_fn", "rate", "learning_rate"}
    return found - {"trainable", "upper", "lazy", "aggregator", *OPTIONAL.get(name, ())}


def _yours(method: str) -> Callable[..., hj.Algorithm]:
    return imported(method, f"--method: expected one of {', '.join(NAMES)}, or")


def imported(text: str, wanted: str) -> Callable[..., Any]:
    """The function of yours that ``module:function`` names.

    Raises:
      ValueError: there is none; the message begins with what is `wanted`.
    """
    module, colon, name = text.partition(":")
    wanted = f"{wanted} module:function of yours, got {text!r}"
    if not colon:
        raise ValueError(wanted)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{wanted}: {error}") from None


def build(
    options: Any, problem: Problem, learning_rate: optax.ScalarOrSchedule
) -> hj.Algorithm | Baseline:
    """Build the method that an `hiso_jax.train.job.Options` asks for.

    A method of yours is ``function(loss_fn, learning_rate, **options) -> Algorithm``, with the
    keywords of `hiso_jax.scalar_algorithm` but for the rule.
    """
    (method, own), loss_fn = parse(options.method), problem.loss_fn
    common: dict[str, Any] = dict(local_steps=options.local_steps, trainable=problem.trainable)
    common |= own
    if method in FIRST_ORDER:
        return baselines.first_order(method, loss_fn, learning_rate, **common)
    common |= dict(
        num_perturbations=options.num_perturbations,
        smoothing=options.smoothing,
        distribution=options.distribution,
    )
    if method == "fedzo":
        return baselines.fedzo(loss_fn, learning_rate, **common)
    common |= dict(estimator=options.estimator, lazy=problem.lazy)
    if options.per_client_directions:
        common |= dict(per_client_directions=options.clients_per_round)
    if options.upper_directions:
        common |= dict(upper=_upper(options, problem))
    if method == "hiso":
        common |= dict(decay=options.decay)
    for settled in SETTLED.get(method, ()):
        del common[settled]
    return (SCALAR.get(method) or _yours(method))(loss_fn, learning_rate, **common)


def _upper(options: Any, problem: Problem) -> list[hj.Split]:
    if problem.upper is None:
        raise ValueError(f"--upper-directions: {problem.name} has no upper part of its own")
    splits, before = [], None
    for count, layers in zip(options.upper_directions, options.upper_layers, strict=True):
        cut = problem.upper(layers, before)
        splits.append(hj.Split(cut.trunk, cut.head, cut.leaves, count, cut.between))
        before = layers
    return splits


def forward_passes(algorithm: hj.Algorithm | Baseline, shares: Sequence[float] = ()) -> float:
    """Forward passes of a client a round; a gradient counts as three.

    One that starts at an upper part counts as that part's share of a pass; so does the way from
    one cut to the next.
    """
    if isinstance(algorithm, Baseline):
        return algorithm.config["local_steps"] * algorithm.config["forward_passes"]
    spec = algorithm.spec
    own = spec.directions
    each = estimators.forward_passes(spec.estimator.config["estimator"], own.per_client)
    if own.still is not None:
        counts = [part.directions for part in own.still.parts]
        each -= sum(n * (1 - share) for n, share in zip(counts, shares, strict=True))
        each += shares[0] - shares[-1]
    return spec.steps * each


def shares(options: Any, problem: Problem) -> list[float]:
    """How much of a forward pass each upper part of the options takes."""
    if not options.upper_directions:
        return []
    return [share(problem, layers) for layers in options.upper_layers]


def share(problem: Problem, layers: int) -> float:
    """How much of a forward pass lies in the last `layers` and above, by multiplications."""
    if problem.upper is None:
        return 1.0
    own = problem.clients[problem.clients.names[0]]
    few = {k: v[:1] for k, v in own.items()} | {"weight": np.ones(1, np.float32)}
    batch, params = problem.prepare(few), problem.params
    cut = problem.upper(layers)
    kept = jax.eval_shape(cut.trunk, params, batch)
    whole = multiplications(problem.loss_fn, params, batch)
    return multiplications(cut.head, params, kept) / whole


def floats(algorithm: hj.Algorithm | Baseline, problem: Problem) -> int:
    """Floats that a client sends up a round."""
    if isinstance(algorithm, Baseline):
        return sum(x.size for x in algorithm.trainable(problem.params).values())
    return math.prod(algorithm.spec.sent)
