"""One run, five programs, the same bits: what replay, catch-up and shipping rest on.

A fused round, `advance` alone, the scanned history of whoever has nothing but the ledger, its
replay in parts, and the digest agree in every row of `ROWS`. Fused and alone cut the leaves in
different ways. Taken together the rows have

    rule        each of `rules.RULES`
    law         normal, near_normal, rademacher
    estimator   forward, central, three_point
    K           1 and more
    dtype       float32, bfloat16, float16
    directions  shared; of each client's own; of a seed pool; of one upper part; of several, at two
                depths; and an upper part's or several's of each client's own
    leaves      whole, in blocks, in layers, packed, several packs beside blocks, lazy
    batches     of one shape, and of two that take turns

and every pair of options in `PAIRS`.
"""

import os
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import optax
import pytest

import hiso_jax as hj
from hiso_jax import directions, estimators, rules
from hiso_jax.algorithm import algorithm
from tests.helpers import (
    PROBLEMS,
    assert_same_bits,
    bits,
    laid_out,
    nothing,
    odd_loss,
    replay_in_blocks,
)

P, ROUNDS, NOBODY = 4, 4, 2  # in one round nobody answers
# The compiler's usual way to write loops, which takes twice as long and which `conftest` turns off.
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if "emitters" in os.environ["XLA_FLAGS"] else {}

LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": dict(small=1),
    "blocks": dict(small=1, block=1024),
    "layers": dict(small=1, flat=False),
    "packed": dict(),
    "packs": dict(small=6000, room=40, block=2048),
}
TOP = {"stack": 3, "rows": 17, "odd": 2, "scalar": 0}  # first rows above the cut
MIDDLE = {"stack": 1, "rows": 0, "odd": 0, "scalar": 0}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "shared": {},
    "own": dict(per_client_directions=3),
    "pool": dict(seed_pool=7),
    "upper": dict(upper=hj.Split(nothing, odd_loss, TOP, 2)),
    "uppers": dict(
        upper=[hj.Split(nothing, odd_loss, TOP, 1), hj.Split(nothing, odd_loss, MIDDLE, 2)]
    ),
}


class Row(NamedTuple):
    rule: str
    law: str
    steps: int
    dtype: str = "float32"
    kinds: tuple[str, ...] = ("shared",)
    estimator: str = "forward"
    fused: str = "packed"
    alone: str = "packs"
    lazy: bool = False
    changing: bool = False  # two numbers of clients take turns

    @property
    def values(self) -> list[str]:
        steps = "K=1" if self.steps == 1 else "K>1"
        return [self.rule, self.law, steps, self.dtype, *self.kinds]


ROWS = {
    "hiso-all": Row("hiso", "normal", 1, fused="packs", alone="packed", changing=True),
    "hiso-bfloat16": Row("hiso", "rademacher", 2, "bfloat16", fused="layers"),
    "hiso-upper": Row("hiso", "near_normal", 1, kinds=("upper",), fused="whole", lazy=True),
    "identity-float16": Row("identity", "near_normal", 2, "float16", fused="blocks", alone="whole"),
    "identity-pool": Row("identity", "rademacher", 2, kinds=("pool",), fused="packs", lazy=True),
    "identity-own": Row("identity", "rademacher", 3, kinds=("own", "uppers")),
    "identity-uppers": Row("identity", "rademacher", 1, kinds=("uppers",), alone="layers"),
    "rms-own": Row("rms", "rademacher", 2, kinds=("own", "upper"), alone="blocks", changing=True),
    "hizoo-own": Row("hizoo", "rademacher", 1, kinds=("own",), estimator="three_point"),
    "adam": Row("adam", "rademacher", 2, alone="blocks"),
    "fzoo": Row("fzoo", "rademacher", 2),
    "momentum": Row("momentum", "rademacher", 2, alone="layers"),
    "meazo": Row("meazo", "rademacher", 2, estimator="central"),
    "hizoo": Row("hizoo", "rademacher", 2, estimator="three_point"),
    "rms": Row("rms", "rademacher", 2),
}
SLOW = {"rms"}  # every option of it is in another row
# As other rows, but for the rule or K.
CI = {"adam", "fzoo", "momentum", "meazo", "hizoo", "identity-uppers"}
PAIRS = """
    hiso normal, hiso near_normal, hiso rademacher, hiso K=1, hiso K>1, hiso float32, hiso bfloat16,
    identity near_normal, identity float16, identity K=1, identity pool, identity own, identity uppers,
    hizoo K=1, hizoo own, rms own, rms upper, hiso upper,
    normal K=1, normal float32, normal shared, near_normal K>1, near_normal float32, near_normal float16,
    near_normal shared, rademacher K=1, rademacher float32, rademacher bfloat16, rademacher own,
    rademacher pool, rademacher upper, rademacher uppers,
    bfloat16 K>1, bfloat16 shared, float16 K>1, float16 shared, float32 K=1,
    K=1 own, K>1 own, K>1 pool, K=1 upper, K>1 upper, K=1 uppers, K>1 uppers, K=1 shared,
    own upper, own uppers
"""  # a comma between pairs; and every rule has "rademacher", "K>1", "float32" and "shared" (below)


def test_the_rows_cover_every_option_and_pair():
    rows = [row for name, row in ROWS.items() if name not in SLOW]
    assert {row.rule for row in rows} == set(rules.RULES)
    assert {row.law for row in rows} == set(get_args(directions.Distribution))
    assert {row.estimator for row in rows} == set(estimators.ESTIMATORS)
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16"}
    assert {row.steps == 1 for row in rows} == {row.lazy for row in rows} == {True, False}
    assert {kind for row in rows for kind in row.kinds} == set(DIRECTIONS)
    assert {row.fused for row in rows} == {row.alone for row in rows} == set(LAYOUTS)
    found = {frozenset(pair) for row in ROWS.values() for pair in combinations(row.values, 2)}
    wanted = [frozenset(pair.split()) for pair in PAIRS.split(",")]
    wanted += [frozenset(pair) for rule in rules.RULES
               for pair in ((rule, "rademacher"), (rule, "K>1"), (rule, "shared"))]  # fmt: skip
    wanted += [frozenset((rule, "float32")) for rule in rules.RULES]
    assert [set(pair) for pair in wanted if pair not in found] == []


def make(row: Row) -> tuple[hj.Algorithm, Any]:
    """The algorithm of a row, and parameters of its dtype, not all of which move."""
    loss_fn, params = PROBLEMS["odd"]
    fixed = {n: params[n] for n in ("frozen", "step")}
    params = {n: x.astype(row.dtype) for n, x in params.items()} | fixed
    every = {"update_steps": "all"} if row.rule == "hiso" and "upper" not in row.kinds else {}
    alg = hj.scalar_algorithm(
        loss_fn, optax.linear_schedule(1e-2, 0, 20), rule=rules.RULES[row.rule](**every),
        estimator=row.estimator, local_steps=row.steps, num_perturbations=P, distribution=row.law,
        trainable=jax.tree.map(lambda x: True, params) | {"frozen": False}, lazy=row.lazy,
        **{k: v for kind in row.kinds for k, v in DIRECTIONS[kind].items()},
    )  # fmt: skip
    return alg, params


def batches(row: Row) -> Iterator[jax.Array]:
    for number in range(ROUNDS):
        clients, width = ((3, 4), (2, 5))[number % 2 * row.changing]
        drawn = np.random.default_rng(number).normal(size=(clients, row.steps, width))
        yield jax.device_put(np.float32(drawn * np.nan if number == NOBODY else drawn))


def test_layouts_are_what_they_are_called():
    alg, params = make(ROWS["hiso-all"])
    for name, options in LAYOUTS.items():
        laid = laid_out(alg, **options).spec.layout.lay(params, alg.spec.rule.init({}))
        assert bool(laid.packs) == ("pack" in name)
        count = laid.layout.blocks(params["stack"].shape)[0]
        assert count == {"blocks": 6, "layers": 4, "packs": 3}.get(name, 1)


@pytest.mark.parametrize("name", [
    pytest.param(
        name, marks=[pytest.mark.slow] * (name in SLOW | CI) + [pytest.mark.ci] * (name in CI)
    ) for name in ROWS
])  # fmt: skip
def test_every_program_reaches_the_same_bits(name: str):
    row = ROWS[name]
    alg, params = make(row)
    fused = jax.jit(laid_out(alg, **LAYOUTS[row.fused]).round)
    advance = jax.jit(laid_out(alg, **LAYOUTS[row.alone]).advance, compiler_options=EMITTERS)
    start = state = alone = alg.init(params, jax.random.key(3))
    with hj.Ledger.create(":memory:", alg, start) as ledger:
        for number, batch in enumerate(batches(row)):
            before = state
            state, metrics = fused(state, batch)
            assert np.isnan(metrics.record).all() == (number == NOBODY)
            assert (bits(state.params) == bits(before.params)) == (number == NOBODY)
            alone = advance(alone, metrics.record)
            assert_same_bits(state, alone)
            ledger.append(metrics.record, hj.digest(state), metrics.learning_rate)
        records = ledger.records()
        again = algorithm(hj.Spec.from_header(ledger.header))  # who has the ledger only
        # Parts that do not begin where 32 divides, some longer than a block and some shorter.
        blocks = replay_in_blocks(ledger, params, most=2**13 - 33)
    assert again.config == alg.config
    scanned = jax.jit(again.replay)(start, records.scalars, records.learning_rates)
    assert_same_bits(state, scanned)
    assert_same_bits(state.params, blocks)
    for leaf in ("frozen", "step"):
        assert_same_bits(state.params[leaf], params[leaf])
    if "upper" in row.kinds and "own" in row.kinds:  # half of the directions move all
        moved = np.asarray(state.params["stack"] != params["stack"])
        assert moved[:3].any() and moved[3].mean() > 0.99
