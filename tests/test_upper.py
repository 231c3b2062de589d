"""Directions that move the upper part only: the scalars of whole passes, and the same bits."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hiso_jax as hj
from hiso_jax import models, split
from hiso_jax._engine import trees
from hiso_jax.algorithm import algorithm
from hiso_jax.models import cnn, subsets, vision
from hiso_jax.tasks import image_problem
from hiso_jax.train import digits, methods
from hiso_jax.train.work import multiplications
from tests.helpers import (
    PROBLEMS,
    assert_same_bits,
    finish,
    head,
    laid_out,
    network_loss,
    nothing,
    odd_loss,
    small_config,
    start,
    trunk,
)

PARAMS = PROBLEMS["network"].params
RNG = np.random.default_rng(0)
BATCHES = {
    "x": RNG.normal(size=(2, 1, 8, 3)).astype(np.float32),
    "y": RNG.normal(size=(2, 1, 8)).astype(np.float32),
}
KEY = jax.random.key(0)
UPPER = hj.Split(trunk, head, {"v": 0}, directions=3)


@pytest.mark.parametrize("own", [None, 2])
@pytest.mark.parametrize("directions", [3, 5])
def test_scalars_are_those_of_whole_passes(own: int | None, directions: int):
    common: dict[str, Any] = dict(num_perturbations=5, smoothing=1e-2, per_client_directions=own)
    kept = UPPER._replace(directions=directions)
    same = kept._replace(trunk=nothing, head=network_loss)  # from the very start
    found = []
    for upper in (kept, same):
        alg = hj.decomfl(network_loss, 0.1, upper=upper, **common)
        found.append(np.asarray(jax.jit(alg.probe)(alg.init(PARAMS, KEY), BATCHES)))
    assert np.abs(found[0]).min() > 1e-3
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    # The directions that move all are those of everybody else.
    plain = hj.decomfl(network_loss, 0.1, **common)
    every = np.asarray(jax.jit(plain.probe)(plain.init(PARAMS, KEY), BATCHES))
    wholes = 5 - directions
    np.testing.assert_allclose(found[0][..., :wholes], every[..., :wholes], rtol=1e-4, atol=1e-4)
    assert not np.isclose(found[0][..., wholes:], every[..., wholes:]).any()


def test_the_alias_of_before_goes_on_by_itself():
    """A loss that tells kept activations from a batch."""
    either = lambda params, batch: (head if "kept" in batch else network_loss)(params, batch)  # noqa: E731
    with pytest.warns(DeprecationWarning, match="hj.Split"):
        old = hj.Upper(trunk, {"v": 0}, directions=3)
    found = []
    for fn, upper in ((either, old), (network_loss, UPPER)):
        alg = hj.decomfl(fn, 0.1, num_perturbations=5, upper=upper)
        found.append(jax.jit(alg.probe)(alg.init(PARAMS, KEY), BATCHES))
    assert_same_bits(*found)


DEEP = {"u": jnp.linspace(-1, 1, 9).reshape(3, 3), **PARAMS}


@pytest.mark.parametrize("steps, own", [(1, None), (2, 2)])
def test_several_cuts_in_one_round(steps: int, own: int | None):
    """Two directions of everything, two from the middle, three from the last layer: each moves its own."""
    low = lambda params, batch: batch | {"x": jnp.tanh(batch["x"] @ params["u"])}  # noqa: E731
    whole = lambda params, batch: network_loss(params, low(params, batch))  # noqa: E731
    cuts = [
        hj.Split(low, network_loss, {"w": 0, "v": 0}, directions=2),
        hj.Split(
            lambda params, batch: trunk(params, low(params, batch)), head, {"v": 2}, directions=3
        ),
    ]
    alg = hj.decomfl(whole, 0.1, local_steps=steps, num_perturbations=7, upper=cuts, smoothing=1e-2,
                     per_client_directions=own, distribution="rademacher")  # fmt: skip
    begin = alg.init(DEEP, KEY)
    batches = {k: np.repeat(v, steps, 1) for k, v in BATCHES.items()}
    found = jax.jit(alg.probe)(begin, batches)
    same = [cut._replace(trunk=nothing, head=whole) for cut in cuts]  # by whole passes
    plain = algorithm(alg.spec._replace(estimator=split.estimator(same, 7, 1e-2)))
    scalars = jax.jit(plain.probe)(begin, batches)
    np.testing.assert_allclose(found, scalars, rtol=1e-3, atol=1e-3)
    # One direction at a time: what it moves.
    advance = jax.jit(alg.advance)
    for p, moves in enumerate(["uwv"] * 2 + ["wv"] * 2 + ["v"] * 3):
        record = np.zeros(alg.spec.record, np.float32)
        record[0, p] = 1  # of one local step only: signs of two may cancel
        after = advance(begin, record)
        moved = {n: np.asarray(after.params[n] != DEEP[n]) for n in DEEP}
        assert {n for n in DEEP if moved[n].any()} == set(moves)
        assert p < 4 or not moved["v"][:2].any()


def test_only_the_upper_part_moves():
    alg = hj.decomfl(network_loss, 0.1, num_perturbations=5, upper=UPPER)
    before, advance = alg.init(PARAMS, KEY), jax.jit(alg.advance)
    after = advance(before, jnp.array([[0.0, 0, 1, 1, 1]]))
    assert_same_bits(after.params["w"], before.params["w"])
    assert (after.params["v"] != before.params["v"]).all()
    after = advance(before, jnp.array([[0.0, 1, 0, 0, 0]]))
    assert (after.params["w"] != before.params["w"]).all()
    assert (after.params["v"] != before.params["v"]).all()


def test_everything_in_the_upper_part_is_the_plain_algorithm():
    params = {"a": jnp.ones((3, 5)), "b": jnp.ones((301, 97)), "c": jnp.ones((512, 256))}
    rows = {n: 0 for n in params}
    upper = hj.Split(nothing, odd_loss, rows, directions=2)
    ends = []
    for options in ({}, {"upper": upper}):
        alg = hj.federated_hiso(odd_loss, 1e-2, num_perturbations=2, **options)
        state = alg.init(params, jax.random.key(1))
        ends.append(jax.jit(alg.replay)(state, jnp.ones((3, 1, 2))))
    assert_same_bits(*ends)


@pytest.mark.parametrize(
    "kind, late",
    [
        pytest.param("opt", True, id="opt-late", marks=[pytest.mark.slow, pytest.mark.ci]),
        pytest.param("opt", False, id="opt", marks=pytest.mark.slow),
        pytest.param("llama", True, id="llama-late", marks=pytest.mark.slow),
        pytest.param("bert", True, id="bert-late", marks=pytest.mark.slow),
        pytest.param("opt-350m", True, id="opt-350m-late", marks=pytest.mark.slow),
        pytest.param("bert", False, id="bert", marks=pytest.mark.slow),
    ],
)
def test_the_last_layers_of_a_model(kind: str, late: bool):
    model = models.from_config(small_config(kind), jax.random.key(0))
    ids = np.random.default_rng(0).integers(3, 640, (3, 1, 2, 8), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[:, :, 0, :3] = 0

    def features(params: Any, batch: Any) -> Any:
        return batch | {"stream": model.lower(params, batch["ids"], batch["mask"], 2)}

    def loss_fn(params: Any, batch: Any, begin: int = 0) -> jax.Array:
        stream = batch["stream"] if begin else None
        x = model.hidden(params, batch["ids"], batch["mask"], stream=stream, begin=begin)[:, -1]
        if kind == "bert":
            return jnp.tanh(x).mean()
        return jax.nn.logsumexp(model.head(params, x, jnp.array([5, 6])), -1).mean()

    batches = {"ids": ids, "mask": mask}
    one = {"ids": ids[0, 0], "mask": mask[0, 0]}
    above = lambda params, kept: loss_fn(params, kept, 2)  # noqa: E731
    ends = jax.jit(lambda p: (above(p, features(p, one)), loss_fn(p, one)))(model.params)
    np.testing.assert_allclose(*ends, rtol=1e-6)
    rows = subsets.upper_rows(model.params, 1)
    assert {row for n, row in rows.items() if subsets.stacked(n)} == {2}
    found = []
    for cut in ((features, above), (nothing, loss_fn)):
        upper = hj.Split(*cut, rows, directions=3)
        alg = laid_out(hj.decomfl(
            loss_fn, 0.1, num_perturbations=4, distribution="rademacher", lazy=late, upper=upper
        ))  # fmt: skip
        found.append(jax.jit(alg.probe)(alg.init(model.params, jax.random.key(1)), batches))
    assert np.abs(np.asarray(found[0])).max() > 0.01
    # A rounding of the loss, 2^-24, over mu.
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_what_lies_above_the_layers():
    for kind, above in (
        ("opt", "final_layer_norm"), ("opt-350m", "project_out"), ("llama", "model/norm"), ("llama", "lm_head")
    ):  # fmt: skip
        rows = subsets.upper_rows(
            models.from_config(small_config(kind), jax.random.key(0)).params, 2
        )
        assert any(above in n for n, row in rows.items() if row == 0)
        assert not any("embed" in n for n in rows)
    with pytest.raises(ValueError, match="1 to 2 of 3 layers, got 3"):
        subsets.upper_rows(models.from_config(small_config("opt"), jax.random.key(0)).params, 3)


@pytest.mark.parametrize(
    "make, layers",
    [(digits.Cnn, 1), pytest.param(cnn.Cnn, 1, marks=pytest.mark.slow), (cnn.Cnn, 2)],
)
def test_the_last_layers_of_a_network(make: Any, layers: int):
    side = 8 if make is digits.Cnn else 28
    columns = {"image": RNG.normal(size=(30, side, side, 1)).astype(np.float32),
               "label": np.arange(30, dtype=np.int32) % 10}  # fmt: skip
    parts = {"train": columns, "dev": columns, "test": columns}
    network = vision.of_network(make(nnx.Rngs(0)), side)
    problem = image_problem.scratch("some", network, parts, 3, 1.0, 0)
    assert problem.upper is not None
    cut = problem.upper(layers)
    assert len(cut.leaves) == 2 * layers
    batch = columns | {"weight": np.ones(30, np.float32)}
    loss_fn = jax.jit(problem.loss_fn)
    kept, above = jax.jit(cut.trunk)(problem.params, batch), jax.jit(cut.head)
    assert "image" not in kept
    np.testing.assert_allclose(
        above(problem.params, kept), loss_fn(problem.params, batch), rtol=1e-6
    )
    moved = trees.merge(problem.params, {n: x + 1 for n, x in trees.named(problem.params).items()
                                         if n in cut.leaves})  # fmt: skip
    np.testing.assert_allclose(above(moved, kept), loss_fn(moved, batch), rtol=1e-6)
    for wrong in (0, len(make.names)):
        with pytest.raises(ValueError, match="--upper-layers"):
            problem.upper(wrong)
    # What it costs: all but the convolutions.
    dense = 960 if side == 8 else (350, 784 * 35 + 350)[layers - 1]
    total = 16 * (16 * 9 + 4 * 9 * 24) + 960 if side == 8 else 8 * 9 * 196 + 16 * 72 * 49 + 27790
    np.testing.assert_allclose(methods.share(problem, layers), dense / total, rtol=1e-6)
    upper = hj.Split(cut.trunk, cut.head, cut.leaves, 4)
    alg = hj.decomfl(problem.loss_fn, 0.1, num_perturbations=6, upper=upper)
    assert methods.forward_passes(alg, [0.25]) == 1 + 2 + 4 * 0.25


def test_multiplications_of_attention():
    model = models.from_config(small_config("opt"), jax.random.key(0))
    ids = jnp.ones((2, 8), jnp.int32)
    count = multiplications(lambda p: model.hidden(p, ids, ids), model.params)
    layer = 2 * 8 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * 2 * 8 * 8 * 64
    assert count == 3 * layer


@pytest.mark.parametrize(
    "upper, options, message",
    [
        (UPPER._replace(directions=6), {}, "at most num_perturbations=5, got 6"),
        (UPPER._replace(directions=0), {}, "upper: directions: expected an int >= 1"),
        (UPPER._replace(leaves={}), {}, "name leaves and rows"),
        (UPPER._replace(leaves={"v": -1}), {}, "name leaves and rows"),
        (UPPER, {"estimator": "central"}, 'goes with estimator="forward"'),
        (UPPER, {"seed_pool": 9}, "without seed_pool"),
    ],
)
def test_bad_upper_parts(upper: hj.Split, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        hj.decomfl(network_loss, 0.1, upper=upper, **options)


def test_an_upper_part_that_is_not_there():
    with pytest.raises(TypeError, match="a Split whose trunk is a function"):
        hj.decomfl(network_loss, 0.1, upper=UPPER._replace(trunk=None))  # type: ignore
    for leaves, message in (({"u": 0}, "'u' is none of the trainable"), ({"v": 4}, "has 4 rows")):
        alg = hj.decomfl(network_loss, 0.1, upper=UPPER._replace(leaves=leaves))
        with pytest.raises(ValueError, match=message):
            alg.init(PARAMS, jax.random.key(0))


@pytest.mark.slow
def test_a_job_with_upper_directions_goes_on(tmp_path: Any):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--upper-directions", "4", "--num-perturbations", "5", "--rounds", "8",
               "--snapshot-every", "3", "--method", "rms", "--learning-rate", "0.1"]  # fmt: skip
    finish(start("digits", *options, "--out", str(whole)))
    first = start("digits", *options, "--out", str(cut))
    while not (cut / "ledger.sqlite").exists() and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.wait()
    finish(start("digits", "--resume", str(cut)))
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
    out = finish(start("digits", "--upper-directions", "11", "--out", str(tmp_path / "no")), code=1)
    assert "--upper-directions: expected at most --num-perturbations 10 in all, got (11,)" in out
