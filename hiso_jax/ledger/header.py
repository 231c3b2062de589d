"""What a run was made of, as plain data: the header of a ledger, and whether it fits."""

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax import directions, estimators
from hiso_jax._engine import checks, trees
from hiso_jax.ledger import digests
from hiso_jax.protocol import Algorithm, State


class Mismatch(ValueError):
    """A header belongs to another base model, algorithm or state."""


def describe(
    algorithm: Algorithm,
    state: State,
    about: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the header of a run that starts at `state`.

    ``algorithm``: every hyper-parameter (``learning_rate`` is ``"schedule"`` where it is a
    function; the values are then in the records). ``key``: PRNG implementation and root key.
    ``base``: digest of the parameters. ``leaves``: [name, dtype, shape, trainable, digest] of
    each. ``software``: versions and backend. ``about``: yours. ``privacy``: the grid of the sums,
    and what protects them, where something does.

    Raises:
      ValueError: `state` is not fresh, the rule has no config, or `about` is not plain data.
    """
    if int(state.round):
        raise ValueError(f"state: expected one fresh from init, got one of round {state.round}")
    if not algorithm.config["rule"]:
        raise ValueError(
            'algorithm: its rule has no config to write down; give it Rule(config={"rule": '
            '"name", argument: value, ...})'
        )
    for choice in ("estimator", "aggregator"):
        if algorithm.config[choice] is None:
            raise ValueError(
                f"algorithm: its {choice} has no name to write down, and another one would look "
                "the same; give it a function with a name, at the top of a module"
            )
    trained = algorithm.trainable(state.params)
    own = digests.by_leaf(state.params)
    leaves = [
        [n, str(jnp.result_type(x)), list(jnp.shape(x)), n in trained, digests.text(own[n])]
        for n, x in trees.named(state.params).items()
    ]
    header = dict(
        algorithm=plain(algorithm.config),
        key=_key(state),
        base=digests.text(digests.total(own.values())),
        leaves=leaves,
        software={name: version(name) for name in ("hiso-jax", "jax", "jaxlib")}
        | {"backend": jax.default_backend()},
        about=dict(about or {}),
        **({"privacy": plain(privacy)} if privacy else {}),
    )
    try:
        return json.loads(canonical(header))
    except (TypeError, ValueError) as error:  # ValueError: NaN, which JSON has no word for
        raise ValueError(f"about: expected plain data (JSON): {error}") from None


def version(package: str) -> str:
    """The version of a package that is installed here."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return "unknown"


def _key(state: State) -> dict[str, Any]:
    data = np.asarray(jax.random.key_data(state.key)).tolist()
    return {"implementation": str(jax.random.key_impl(state.key)), "data": data}


def plain(value: Any) -> Any:
    """Numbers of NumPy and JAX as Python's, all the way down."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    return value


def canonical(header: Mapping[str, Any]) -> str:
    """The one way in which a header is written as JSON."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def shape(header: Mapping[str, Any]) -> tuple[int, int]:
    """(K, P) of its records: P is C times that sent with per-client directions."""
    config = header["algorithm"]
    each = estimators.scalars_per_direction(config.get("estimator", "forward"))
    return int(config["local_steps"]), each * directions.Directions.from_config(config).total


def check(header: Any) -> None:
    """Raise ValueError unless all that others rely on is there, and of its kind."""
    try:
        _check(header)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"no header of a ledger: {error}") from error


def _check(header: Any) -> None:
    missing = {"algorithm", "key", "base", "leaves", "software"} - set(header)
    if missing:
        raise ValueError(f"the header lacks {sorted(missing)}")
    wanted = {"rule", "learning_rate", "local_steps", "num_perturbations", "distribution"}
    if missing := wanted - set(header["algorithm"]):
        raise ValueError(f"the header's algorithm lacks {sorted(missing)}")
    if not all(isinstance(n, int) and n > 0 for n in shape(header)):
        raise ValueError(f"the header's records have shape {shape(header)}")
    if (rate := header["algorithm"]["learning_rate"]) != "schedule":
        checks.number("learning_rate", rate, 0)
    digests.parse(header["base"])
    if not isinstance(header["software"], Mapping):
        raise ValueError("the header's software: expected names and versions")


def match_algorithm(header: Mapping[str, Any], algorithm: Algorithm) -> None:
    """Raise Mismatch, naming the fields, unless the header is of this algorithm."""
    _match_config(header, json.loads(canonical(plain(algorithm.config))))


def match(header: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise Mismatch, naming fields or leaves, unless two headers are of one run.

    Args:
      header: of the run, "there".
      other: what the other party made of its algorithm and fresh state, "here". Who it is from
        may have written anything: what is no header is a mismatch.
    """
    try:
        check(other)
        _match_config(header, other["algorithm"])
        if header["key"] != other["key"]:
            raise Mismatch(f"another root key: {header['key']} there, {other['key']} here")
        ours, given = (
            {str(e[0]): [str(e[1]), list(e[2]), bool(e[3]), *e[4:5]] for e in h["leaves"]}
            for h in (header, other)
        )
    except Mismatch:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise Mismatch(f"what it says of itself is no header: {error}") from None
    if header.get("privacy") != other.get("privacy"):
        raise Mismatch(f"something else is promised of privacy: {header.get('privacy')} there, "
                       f"{other.get('privacy')!s:.500} here")  # fmt: skip
    if ours.keys() != given.keys():
        there, here = sorted(ours.keys() - given.keys()), sorted(given.keys() - ours.keys())
        raise Mismatch(f"other leaves: only there {_few(there)}, only here {_few(here)}")
    for name, entry in ours.items():
        if entry[:2] != given[name][:2]:
            raise Mismatch(f"leaf {name!r} is {entry[:2]} there and {given[name][:2]} here")
    if wrong := [name for name in ours if ours[name][2] != given[name][2]]:
        raise Mismatch(f"other leaves are trainable there: {_few(wrong)}")
    if header["base"] != other["base"]:
        wrong = [name for name in ours if ours[name][3:] != given[name][3:]]
        where = f"; leaves with other values: {_few(wrong)}" if wrong else ""
        raise Mismatch(
            f"another base model: its digest is {header['base']} there and {other['base']} "
            f"here{where}"
        )


def _match_config(header: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    ours = header["algorithm"]
    differ = [
        f"{field} is {ours.get(field)!r} there and {given.get(field)!r} here"
        for field in sorted(ours.keys() | given.keys())
        if ours.get(field) != given.get(field)
    ]
    if differ:
        raise Mismatch(f"it belongs to another algorithm: {'; '.join(differ)}")


def match_state(
    header: Mapping[str, Any],
    state: State,
    algorithm: Algorithm | None,
    rounds: int,
    digest: str | None,
) -> None:
    """Raise Mismatch, naming the leaves, unless the header's run passes through this state.

    Args:
      header: of the run.
      state: fresh from init, or later.
      algorithm: to compare what is trained, if given.
      rounds: how long the run is.
      digest: the run's after as many rounds as `state` has, if it is known.
    """
    if header["key"] != _key(state):
        raise Mismatch(f"another root key: {header['key']} there, {_key(state)} here")
    if (done := int(state.round)) > rounds:
        raise Mismatch(f"it has {rounds} rounds, the state {done}")
    # Of later states too: a digest says nothing of leaves without elements, nor of which are
    # trained where the rule keeps nothing for them.
    ours = {entry[0]: entry[1:] for entry in header["leaves"]}
    _match_leaves(ours, state, algorithm)
    if not done:
        _match_base(header, ours, state)
    elif digest not in (None, here := digests.text(digests.digest(state))):
        raise Mismatch(f"its digest after {done} rounds is {digest}, the state's {here}")


def _match_leaves(ours: Mapping[str, list[Any]], state: State, algorithm: Algorithm | None) -> None:
    given = trees.named(state.params)
    if ours.keys() != given.keys():
        there, here = sorted(ours.keys() - given.keys()), sorted(given.keys() - ours.keys())
        raise Mismatch(f"other leaves: only there {_few(there)}, only here {_few(here)}")
    for name, leaf in given.items():
        kind = [str(jnp.result_type(leaf)), list(jnp.shape(leaf))]
        if ours[name][:2] != kind:
            wide = ("float64", "int64", "uint64")
            hint = "; set jax_enable_x64" if ours[name][0] in wide and kind[0] not in wide else ""
            raise Mismatch(f"leaf {name!r} is {ours[name][:2]} there and {kind} here{hint}")
    if algorithm is not None:
        trained = algorithm.trainable(state.params)
        if wrong := [n for n in ours if ours[n][2] != (n in trained)]:
            raise Mismatch(f"other leaves are trainable there: {_few(wrong)}")


def _match_base(header: Mapping[str, Any], ours: Mapping[str, list[Any]], state: State) -> None:
    own = digests.by_leaf(state.params)
    if digests.text(digests.total(own.values())) != header["base"]:
        # A compact file has no digests of single leaves.
        wrong = [n for n, x in own.items() if digests.text(x) not in ours[n]]
        where = f"; leaves with other values: {_few(wrong)}" if len(header["leaves"][0]) > 4 else ""
        raise Mismatch(f"another base model: its digest is not {header['base']}{where}")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more
