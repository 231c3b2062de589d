"""Ledgers made of compact files, and headers that nobody has written: whole, or refused."""

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hiso_jax as hj
from hiso_jax.ledger import compact, tables
from hiso_jax.ledger.header import describe
from tests.helpers import quadratic_loss
from tests.test_ledger import start


def test_an_import_for_which_there_is_no_room_leaves_nothing(tmp_path: Path):
    """Not a ledger that opens with fewer rounds; and it is made when there is room again."""
    compact_, to = tmp_path / "run.safetensors", tmp_path / "again.sqlite"
    alg = hj.decomfl(quadratic_loss, 0.1)
    scalars = np.ones((300, 1, 5), np.float32)
    compact.write(compact_, describe(alg, start(alg)) | {"about": {}}, scalars, None, None)
    hj.Ledger.import_(compact_, to).close()
    size = to.stat().st_size
    to.unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (100, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
        try:
            with pytest.raises(hj.LedgerWriteError, match=f"{to}: the ledger cannot be written"):
                hj.Ledger.import_(compact_, to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert list(tmp_path.iterdir()) == [compact_]
    with hj.Ledger.import_(compact_, to) as again:
        assert again.rounds == 300


@pytest.mark.parametrize("odd", [
    dict(learning_rate="fast"), dict(learning_rate=None), dict(learning_rate={"a": 1}),
    dict(learning_rate=-1), dict(learning_rate=True), dict(local_steps="x"), dict(local_steps=-1),
    dict(local_steps=None), dict(num_perturbations=[1]), dict(num_perturbations=0),
    dict(num_perturbations=float("1e400")), dict(own_directions="x"), dict(distribution={}),
    dict(upper=[3]),
])  # fmt: skip
def test_a_header_that_none_has_written_is_refused_at_both_doors(
    odd: dict[str, Any], tmp_path: Path
):
    alg = hj.decomfl(quadratic_loss, 0.1)
    header = describe(alg, start(alg))
    own = header | {"algorithm": header["algorithm"] | odd}
    tables.create(str(tmp_path / "a"), json.dumps(own)).close()
    with pytest.raises(hj.CorruptLedger, match="a: the header"):
        hj.Ledger.open(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact.headers, "canonical", json.dumps)  # which writes infinity
        compact.write(tmp_path / "b", own, np.zeros((1, 1, 5), np.float32), None, None)
        for to in (":memory:", tmp_path / "c"):
            with pytest.raises(hj.CorruptLedger, match="b: not a compact ledger"):
                hj.Ledger.import_(tmp_path / "b", to)
    assert not (tmp_path / "c").exists()


def test_parts_of_a_compact_file_that_do_not_fit_are_refused(tmp_path: Path):
    fixed, scheduled = (hj.decomfl(quadratic_loss, rate) for rate in (0.1, lambda round: 0.1))
    scalars = np.zeros((2, 1, 5), np.float32)
    for alg, given, rates in [
        (fixed, scalars, np.ones(2)), (scheduled, scalars, None), (scheduled, scalars, np.ones(1)),
        (scheduled, scalars, np.ones((2, 1))), (scheduled, scalars, np.array([1, np.nan])),
        (fixed, scalars[:, :, :3], None), (fixed, scalars[0], None),
    ]:  # fmt: skip
        compact.write(tmp_path / "a", describe(alg, start(alg)), given, rates, None)
        with pytest.raises(hj.CorruptLedger, match="it is not as it was written"):
            hj.Ledger.import_(tmp_path / "a")
    for alg, rates in ((fixed, None), (scheduled, np.ones(2))):
        compact.write(tmp_path / "a", describe(alg, start(alg)), scalars, rates, None)
        assert hj.Ledger.import_(tmp_path / "a").rounds == 2
