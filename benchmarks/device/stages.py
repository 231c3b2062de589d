"""The operations that a round is made of, one at a time, on fixed numbers.

Where the digest of a whole program differs on a device, the first of these that differs names the
operation. They are in the order in which a round needs them: whatever comes later is made of what
comes before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

import hiso_jax as hj
from hiso_jax import directions, estimators
from hiso_jax._engine import exact

COUNT = 4099
"""Numbers in a grid: odd, so that vectors and blocks have a rest."""


class Stage(NamedTuple):
    """One operation.

    Attributes:
      function: of arrays, to be compiled.
      inputs: NumPy's, made of integers, so that they are the same everywhere.
    """

    function: Callable[..., Any]
    inputs: tuple[np.ndarray | np.generic, ...]


def words(salt: int = 0) -> np.ndarray:
    """Fixed words that look random, uint32 [COUNT]."""
    place = np.arange(COUNT, dtype=np.uint64) + np.uint64(salt * COUNT + 1)
    return ((place * np.uint64(2654435761)) ^ (place << np.uint64(17))).astype(np.uint32)


def positive(low: int = 0x00800000, high: int = 0x7F000000) -> np.ndarray:
    """Normal positive float32 numbers of all sizes between two bit patterns."""
    patterns = np.linspace(low, high, COUNT, dtype=np.float64).astype(np.uint32)
    return (patterns ^ (words(1) & np.uint32(0xFFF))).view(np.float32)


def signed() -> np.ndarray:
    """Float32 numbers of both signs, subnormal ones and zeros among them."""
    patterns = positive().view(np.uint32) | (words(2) & np.uint32(0x80000000))
    patterns[::97] &= np.uint32(0x807FFFFF)
    patterns[::389] &= np.uint32(0x80000000)
    return patterns.view(np.float32)


def ordinary(salt: int) -> np.ndarray:
    """Float32 numbers between -8 and 8 with all their digits."""
    return ((words(salt) >> np.uint32(8)).astype(np.float32) - np.float32(2**23)) * np.float32(
        2.0**-20
    )


def key_data() -> np.ndarray:
    """The data of a fixed key."""
    return np.array([2025, 7], np.uint32)


def _key(data: Any) -> jax.Array:
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def _uniform() -> np.ndarray:
    """Odd multiples of 2^-24 in (-1, 1): what normal numbers are made of."""
    whole = words(3).view(np.int32) >> np.int32(8)
    return (whole.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)


def _contracted(a: Any, b: Any, c: Any) -> jax.Array:
    """A product and a sum that a compiler would like to make one operation of."""
    return exact.no_fma(a * b) + c


def _draw(law: str) -> Callable[..., Any]:
    def draw(data: Any, starts: Any) -> Any:
        key = _key(data)
        whole = directions.draw(key, (33, 65), law)
        return whole, directions.draw(key, (3, 65), law, starts)

    return draw


def _reconstruct(law: str) -> Callable[..., Any]:
    def reconstruct(data: Any, scalars: Any) -> Any:
        def noise(p: Any) -> Any:
            return {"w": directions.draw(directions.fold_in(_key(data), p), (7, 65), law)}

        like = {"w": jnp.zeros((7, 65))}
        return estimators.reconstruct(scalars, noise, like, seconds=scalars)

    return reconstruct


def _perturb(data: Any, w: Any) -> Any:
    params = {"a": w, "b": w.astype(jnp.bfloat16), "c": w.astype(jnp.float16)}
    key = directions.direction_key(_key(data), 3, 1, 2)
    return directions.perturb(params, directions.noise(key, params, "rademacher"), 1e-3)


def _rule(name: str) -> Callable[..., Any]:
    """Two updates of a rule, and the direction that it then gives."""

    def run(noise: Any, delta: Any, scalars: Any) -> Any:
        rule = hj.rules.RULES[name]()
        state, steps = rule.init({"w": noise}), []
        for k in range(2):
            ascent = {"w": delta[k]}
            given = (ascent, {"w": jnp.abs(delta[1 - k])}) if rule.second else ascent
            step, state = rule.update(state, given, scalars[k], jnp.bool_(k == 1))
            steps.append(step)
        return steps, state, rule.direction(state, {"w": noise})

    return run


def all_stages() -> dict[str, Stage]:
    """Every stage by name, in order."""
    starts = np.array([0, 32, 1024], np.uint32)
    scalars, few = ordinary(6)[:5], positive(0x21800000, 0x5D800000)  # 2^-60 to 2^60
    pair = (np.stack([ordinary(7), ordinary(8)]), np.stack([ordinary(9)[:5], ordinary(10)[:5]]))
    found = {
        "transfer to the device, and the digest itself": Stage(lambda x: x, (signed(),)),
        "sum": Stage(lambda a, b: exact.flush_subnormals(a + b), (ordinary(4), ordinary(5))),
        "exact.flush_subnormals": Stage(exact.flush_subnormals, (signed(),)),
        "exact.mul": Stage(exact.mul, (signed(), ordinary(4) * np.float32(2.0**-20))),
        "exact.no_fma": Stage(_contracted, (ordinary(4), ordinary(5), ordinary(6))),
        "exact.total": Stage(exact.total, (ordinary(4)[:129],)),
        "exact.rsqrt": Stage(exact.rsqrt, (positive(),)),
        "exact.sqrt": Stage(exact.sqrt, (positive(),)),
        "exact.reciprocal": Stage(exact.reciprocal, (few,)),
        "exact.axpy": Stage(lambda x, z: exact.axpy(x, 1e-3, z), (ordinary(4), ordinary(5))),
        "exact.normal_quantile": Stage(exact.normal_quantile, (_uniform(),)),
        "exact.near_normal": Stage(exact.near_normal, (words(3).view(np.int32) >> np.int32(10),)),
        "directions.fold_in": Stage(
            lambda data, n: jax.random.key_data(directions.fold_in(_key(data), n)),
            (key_data(), words()),
        ),
        "directions.words": Stage(
            lambda data, start: directions.words(_key(data), COUNT, start),
            (key_data(), np.uint32(2**32 - 99)),
        ),
    }
    laws = get_args(directions.Distribution)
    for law in laws:
        found[f"directions.draw, {law}"] = Stage(_draw(law), (key_data(), starts))
    for law in laws:
        found[f"estimators.reconstruct, {law}"] = Stage(_reconstruct(law), (key_data(), scalars))
    found["directions.perturb"] = Stage(_perturb, (key_data(), ordinary(4)))
    for kind in (jnp.bfloat16, jnp.float16):
        found[f"exact.stochastic_round, {jnp.dtype(kind)}"] = Stage(
            lambda w, x, kind=kind: exact.stochastic_round(w, x, jnp.dtype(kind)),
            (words(), ordinary(4)),
        )
    for name in hj.rules.RULES:
        found[f"rules.{name}"] = Stage(_rule(name), (ordinary(11), *pair))
    return found


def compute(stage: Stage) -> Any:
    """What a stage gives on the default device."""
    inputs = [jnp.asarray(x) for x in stage.inputs]
    return jax.jit(stage.function, compiler_options=hj.compiler_options())(*inputs)


def digest(stage: Stage) -> str:
    """The digest of what a stage gives."""
    return hj.fingerprint.text(hj.digest(compute(stage)))


def first_difference(compute_on: Callable[[], Any]) -> str:
    """The first number that the CPU of this process computes otherwise, in words.

    Digests say that something differs; which number, only two devices in one process can.

    Args:
      compute_on: computes a pytree on what is then JAX's default device.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        return "this process has no CPU to compare single numbers with"
    ours = jax.tree_util.tree_leaves_with_path(compute_on())
    with jax.default_device(cpu):
        theirs = jax.tree.leaves(compute_on())
    for (path, a), b in zip(ours, theirs, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            continue  # never changes
        a, b = (np.ascontiguousarray(np.asarray(x)).reshape(-1) for x in (a, b))
        bits = [x.view(np.dtype(f"uint{8 * a.dtype.itemsize}")) for x in (a, b)]
        wrong = np.flatnonzero(bits[0] != bits[1])
        if wrong.size:
            place = int(wrong[0])
            shown = [
                f"{x[place]!s} (0x{int(y[place]):x})" for x, y in zip((a, b), bits, strict=True)
            ]
            return (
                f"{wrong.size} of {a.size} numbers of {jax.tree_util.keystr(path) or 'it'} differ, "
                f"first number {place}: {shown[0]} here, {shown[1]} on the CPU"
            )
    return "the CPU of this process computes the same"
