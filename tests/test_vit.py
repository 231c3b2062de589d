"""ViT: the way there and back, bad input, upper parts, adapters; against torch: `test_parity`."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hiso_jax as hj
from hiso_jax import models
from hiso_jax._engine import trees
from hiso_jax.models import adapters, subsets
from tests.helpers import assert_same_bits, load, refused

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=44,
             image_size=16, patch_size=8, num_labels=5)  # fmt: skip
RNG = np.random.default_rng(0)


def pixels(config: Any, count: int = 3) -> np.ndarray:
    size = config.image_size
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    return RNG.normal(size=(count, *sides, config.num_channels)).astype(np.float32)


def random_model(**options: Any) -> models.Model:
    from transformers import ViTConfig

    model = models.from_config(ViTConfig(**SMALL | options), jax.random.key(0))
    wide = {n: x * 8 for n, x in trees.named(model.params).items()}  # differences that show
    return model._replace(params=trees.merge(model.params, wide))


@pytest.fixture(scope="module")
def model() -> models.Model:
    return random_model()


def test_there_and_back_to_the_bit(model: models.Model, tmp_path: Path):
    models.save_pretrained(model, tmp_path)
    back = load(tmp_path)
    assert_same_bits(back.params, model.params)
    assert back.config.num_labels == 5
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["vit.embeddings.patch_embeddings.projection.weight"].shape == (32, 3, 8, 8)
    assert "vit.encoder.layer.2.attention.attention.query.weight" in stored


def test_what_does_not_fit_is_refused(model: models.Model, tmp_path: Path):
    models.save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for broken, text in (
        ({k: v for k, v in stored.items() if "cls_token" not in k}, "missing.*cls_token"),
        (stored | {"vit.embeddings.position_embeddings": np.ones((1, 9, 32), np.float32)},
         r"has shape \(1, 9, 32\), expected \(1, 5, 32\)"),
        (stored | {"decoder.0.weight": np.ones(3, np.float32)}, "unknown tensors.*decoder"),
    ):  # fmt: skip
        save_file(broken, tmp_path / "model.safetensors")
        refused(tmp_path, text)
    for given in (np.ones((2, 8, 16, 3)), np.ones((16, 16, 3)), np.ones((2, 16, 16, 1))):
        with pytest.raises(ValueError, match=r"pixels: expected shape \[B, 16, 16, 3\]"):
            model.apply(model.params, given.astype(np.float32))
    with pytest.raises(ValueError, match="hidden_act 'silu' is not supported"):
        random_model(hidden_act="silu")


def test_upper_directions_see_the_loss_that_whole_passes_see(model: models.Model):
    given = pixels(model.config)
    whole = jax.jit(model.apply)(model.params, given)

    def loss_fn(params: Any, batch: Any, stream: Any = None) -> jax.Array:
        hidden = model.hidden(params, batch, stream=stream, begin=2)
        return (model.head(params, hidden) ** 2).mean()

    kept = model.lower(model.params, given, 2)
    again = model.lower(model.params, given, 2, model.lower(model.params, given, 1), 1)
    np.testing.assert_allclose(again, kept, atol=1e-5)
    upper = subsets.upper_rows(model.params, 1)
    assert {n for n, row in upper.items() if row == 0} == {
        "classifier/kernel", "classifier/bias", "vit/layernorm/scale", "vit/layernorm/bias"}  # fmt: skip
    assert upper["vit/encoder/layer/output/dense/kernel"] == 2
    leaves = trees.named(model.params)
    moved = trees.merge(model.params, {  # above the cut only
        n: np.concatenate([leaves[n][:row], 1.1 * np.asarray(leaves[n])[row:]])
        for n, row in upper.items()})  # fmt: skip
    wanted = (jax.jit(model.apply)(moved, given) ** 2).mean()
    np.testing.assert_allclose(jax.jit(loss_fn)(moved, given, kept), wanted, rtol=1e-5)
    assert not np.allclose(wanted, (whole**2).mean(), rtol=1e-3)


def test_lazy_leaves_give_the_loss_of_arrays(model: models.Model):
    loss_fn = lambda params, batch: (model.apply(params, batch) ** 2).mean()  # noqa: E731
    given = pixels(model.config)[None, None]
    found = []
    for lazy in (False, True):
        alg = hj.decomfl(loss_fn, 1e-3, num_perturbations=2, lazy=lazy, distribution="rademacher")
        _, metrics = jax.jit(alg.round)(alg.init(model.params, jax.random.key(0)), given)
        found.append(metrics.scalars)
    np.testing.assert_allclose(*found, rtol=2e-2, atol=2e-2)


def test_lora_begins_at_the_model_and_moves_it(model: models.Model):
    subset = adapters.subset_of(model, "lora", 2, 4.0, ("query", "value"))
    assert_same_bits(subset.whole(subset.params), model.params)
    names = trees.named(subset.params["lora"])
    assert len(names) == 4 and all(n.endswith(("/a", "/b")) for n in names)
    changed = subset.params | {"lora": {n: x + 0.1 for n, x in names.items()}}
    given = pixels(model.config)
    before = model.apply(model.params, given)
    assert np.abs(model.apply(subset.whole(changed), given) - before).max() > 1e-3
    with pytest.raises(ValueError, match="targets: expected some of .*'query'.*got 'q_proj'"):
        adapters.subset_of(model, "lora", 2, 4.0, ("q_proj",))
    last = adapters.subset_of(model, "last-1", 2, 4.0, ())
    assert_same_bits(last.whole(last.params), model.params)
    assert {x.shape[0] for x in trees.named(last.params["last"]).values()} == {1}
