"""Bad input at the door: what was given, what is wanted, which argument."""

import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hiso_jax._engine.shapes import Array, ArrayLike, Float, Number, Real

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+", re.ASCII)


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` can be looked at now (they cannot inside jit)."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))


def count(name: str, value: Any) -> int:
    """Return a whole number >= 1 as int."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}: must be known before compiling, got a traced value; under "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    if integer is None:
        raise TypeError(f"{name}: expected an int >= 1, got {value!r}")
    if integer < 1:
        raise ValueError(f"{name}: expected an int >= 1, got {integer}")
    return integer


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *,
    above: bool = False, below: bool = False,
) -> Any:  # fmt: skip
    """Return a real number in [low, high], without low if `above`, without high if `below`.

    Traced values pass. Arrays and NumPy's numbers become Python's, which have no type of their own
    to make others of theirs, and can be hashed and written down.
    """
    if isinstance(value, Tracer):
        return value
    if isinstance(value, (bool, str)) or np.ndim(value) or not np.isrealobj(value):
        raise TypeError(f"{name}: expected a real number, got {value!r}")
    try:
        real = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a real number, got {value!r}") from None
    most = f" and {'<' if below else '<='} {high:g}" if high < math.inf else ""
    wanted = f"{'>' if above else '>='} {low:g}{most}"
    out = real > high or real < low or (above and real == low) or (below and real == high)
    if not math.isfinite(real) or out:
        raise ValueError(f"{name}: expected a finite number {wanted}, got {value!r}")
    return real if isinstance(value, (np.generic, np.ndarray, jax.Array)) else value


def choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
    return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, and pandas' NA and NaT."""
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # NA knows no truth; arrays have several
        return not isinstance(value, np.ndarray)


def nfc(text: str) -> str:
    """A text as texts are compared: what is one sign to a reader may be several to Unicode.

    Example:
      >>> nfc("e" + chr(0x301)) == chr(0xE9)
      True
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def spell(value: Any) -> str | None:
    """The text of a label or name in data, without white space around it; None if it is missing.

    Missing are None, NaN and empty text. Floats that are whole numbers are written as those.

    Raises:
      ValueError: a list, an object or bytes are neither.

    Example:
      >>> spell(1), spell(1.0), spell("1.0"), spell(" up "), spell("01"), spell(True)
      ('1', '1', '1', 'up', '01', 'True')
      >>> spell(None), spell(""), spell(float("nan")), spell("NA")
      (None, None, None, 'NA')
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple, dict, bytes, np.ndarray)):
        raise ValueError(f"expected text, a number or a truth value, got {value!r:.60}")
    if is_missing(value):
        return None
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return {"-0": "0"}.get(text, text) or None


def client(argument: str, value: Any) -> str:
    """Return a client's name as text, which is what ledgers and servers keep.

    Raises:
      ValueError: `value` stands for a missing one: None, NaN or empty text.
    """
    if is_missing(value) or isinstance(value, np.ndarray) or not (text := str(value)):
        raise ValueError(f"{argument}: expected a client's name, got {value!r}")
    return text


def clients(argument: str, values: Iterable[Any]) -> list[str]:
    """Return clients' names as text, in their order.

    Raises:
      ValueError: there is none, one is missing, or two are the same text; or `values` is one
        text itself.
    """
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{argument}: expected a list of names, got the text {values!r}")
    given: dict[str, Any] = {}
    for value in values:
        if (text := client(argument, value)) in given:
            raise ValueError(f"{argument}: expected different names of clients, got {text!r} twice "
                             f"(as {given[text]!r} and {value!r})")  # fmt: skip
        given[text] = value
    if not given:
        raise ValueError(f"{argument}: expected at least one client, got none")
    return list(given)


def groups(argument: str, names: Iterable[Any]) -> dict[str, np.ndarray]:
    """The numbers of the examples of each name, in order of appearance, each ascending.

    Raises:
      ValueError: an example has no name, or one that is no text, number or truth value.
    """
    own: dict[str, list[int]] = {}
    first: dict[str, str] = {}
    for number, value in enumerate(names):
        if (name := spell(value)) is None:
            raise ValueError(f"{argument}: example {number} has none, got {value!r}")
        own.setdefault(first.setdefault(nfc(name), name), []).append(number)
    return {name: np.array(numbers) for name, numbers in own.items()}


def batches(loss_fn: Callable[..., Any], params: Any, batches: Any, steps: int) -> None:
    """Raise unless the leaves of `batches` are [C, K, ...] and the loss of one is a number."""
    shapes = {jnp.shape(x)[:2] for x in jax.tree.leaves(batches)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or min(shapes)[1] != steps:
        given = jax.tree.map(jnp.shape, batches)
        raise ValueError(
            f"batches: every leaf must have leading axes [C, K] (clients, {steps} local steps), "
            f"the same C for all; got shapes {given}"
        )
    if min(shapes)[0] == 0:
        raise ValueError("batches: expected at least one client along the first axis, got none")
    first = lambda batches: jax.tree.map(lambda x: x[0, 0], batches)  # noqa: E731
    loss(jax.eval_shape(lambda params, all: loss_fn(params, first(all)), params, batches))


def loss(value: Any) -> None:
    """Raise unless a loss (or its shape) is one float32 or float64 number."""
    if not hasattr(value, "shape") or value.shape != ():
        raise ValueError(
            f"loss_fn: expected a scalar loss of shape (), got {jax.tree.map(jnp.shape, value)}"
        )
    if value.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"loss_fn: expected a float32 loss, got {value.dtype}; a difference of two losses "
            "needs its digits, so cast the logits with .astype(jnp.float32) before the loss"
        )


def record(record: Real[ArrayLike, "K S"], shape: tuple[int, int]) -> Float[Array, "K S"]:
    """Return a record as float32 [K, P]; finite, or NaN only for a round nobody answered."""
    record = jnp.asarray(record, jnp.float32)
    if record.shape != shape:
        raise ValueError(f"record: expected shape {shape} (local steps, perturbations), got "
                         f"{record.shape}")  # fmt: skip
    if is_concrete(record):
        values = np.asarray(record)
        if not np.isfinite(values).all() and not np.isnan(values).all():
            raise ValueError("record: expected finite scalars, or NaN only for a round nobody "
                             f"answered, got {values.tolist()}")  # fmt: skip
    return record


def records(
    records: Real[ArrayLike, "R K S"], rates: Real[ArrayLike, "R"] | None, shape: tuple[int, int]
) -> tuple[Float[Array, "R K S"], Float[Array, "R"] | None]:
    """Return records as float32 [R, K, P], and learning rates [R] if any are given."""
    records = jnp.asarray(records, jnp.float32)
    if records.ndim != 3 or records.shape[1:] != shape:
        raise ValueError(f"records: expected shape [R, {shape[0]}, {shape[1]}] (rounds, "
                         f"local steps, perturbations), got {records.shape}")  # fmt: skip
    if is_concrete(records):
        values = np.asarray(records)
        bad = np.flatnonzero(~np.isfinite(values).all((1, 2)) & ~np.isnan(values).all((1, 2)))
        if bad.size:
            raise ValueError(f"records: NaN or infinite scalars in records {bad.tolist()}")
    if rates is not None:
        rates = jnp.asarray(rates, jnp.float32)
        if rates.shape != records.shape[:1]:
            raise ValueError(f"learning_rates: expected shape ({len(records)},), one a record, "
                             f"got {rates.shape}")  # fmt: skip
        if is_concrete(rates):
            values = np.asarray(rates)
            if (bad := values[~(np.isfinite(values) & (values >= 0))]).size:
                raise ValueError(f"learning_rates: expected finite numbers >= 0, got {bad[0]}")
    return records, rates


def rate(value: Number) -> Float[Array, ""]:
    """Return a learning rate as float32."""
    return jnp.asarray(number("learning_rate", value, 0), jnp.float32)


def weights(weights: Real[ArrayLike, "C"] | None, clients: int) -> Float[Array, "C"]:
    """Return the clients' weights as float32 [C]; by default all are 1."""
    if weights is None:
        return jnp.ones(clients, jnp.float32)
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape != (clients,):
        raise ValueError(f"weights: expected shape ({clients},), one a client, got {weights.shape}")
    if is_concrete(weights):
        values = np.asarray(weights)
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise ValueError(
                f"weights: expected finite numbers >= 0 with a sum > 0, got {values.tolist()}"
            )
    return weights
