"""What replay makes of a folder is what the run saves, whatever else lies in the base."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, LlamaConfig

import hiso_jax as hj
from hiso_jax import models
from hiso_jax.ledger import rebuild
from hiso_jax.models import vision
from hiso_jax.train import notes

SMALL: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=32,
                             num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
LLAMA = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)
BERT = BertConfig(**SMALL, architectures=["BertForMaskedLM"])


def base(folder: Path, config: Any, dtype: Any = jnp.float32) -> dict[str, np.ndarray]:
    """A folder of random weights; its tensors."""
    models.save_pretrained(models.from_config(config, jax.random.key(0), dtype), folder)
    return load_file(folder / "model.safetensors")


def tied_head(folder: Path) -> None:
    """With the embeddings once more, as PyTorch's files have them."""
    tensors = base(folder, LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def tied_masked(folder: Path) -> None:
    tensors = base(folder, BERT)
    part = "cls.predictions."
    tensors[f"{part}decoder.bias"] = tensors[f"{part}bias"].copy()
    tensors[f"{part}decoder.weight"] = tensors["embeddings.word_embeddings.weight"].copy()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def half(folder: Path) -> None:
    """Of two bytes a number, and so says its config, by both names."""
    base(folder, LLAMA, jnp.float16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))


def two_indexes(folder: Path) -> None:
    """Of shards, one of which has a copy; beside them the index of PyTorch's, in more parts."""
    tied_head(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for kind, count in (("model.safetensors", 2), ("pytorch_model.bin", 3)):
        stem, suffix = kind.split(".")
        parts = [f"{stem}-0000{i}-of-0000{count}.{suffix}" for i in range(1, count + 1)]
        where = {name: parts[i % count] for i, name in enumerate(tensors)}
        (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": where}))
        for part in parts if count == 2 else ():
            save_file({n: tensors[n] for n in tensors if where[n] == part}, folder / part)


def sentences(folder: Path) -> None:
    """Of sentence-transformers: modules beside the model, and one that names another's folder."""
    base(folder, BERT)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder.parent / "secret").mkdir()
    (folder.parent / "secret" / "key").write_text("x")
    (folder.parent / "secret.txt").write_text("x")
    listed = [
        {"path": ""},
        {"path": "1_Pooling"},
        {"path": "2_Normalize"},
        {"path": "../secret"},
        {"path": ".."},
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "tokenizer.json").write_text("{}")


def small_files(folder: Path) -> dict[str, str]:
    """All but the weights and their index, as text."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".safetensors" not in path.name
    }


@pytest.mark.parametrize("make", [tied_head, tied_masked, half, two_indexes, sentences])
def test_a_replayed_folder_is_the_one_that_the_run_saves(make: Any, tmp_path: Path):
    make(folder := tmp_path / "base")
    model = models.from_pretrained(folder, progress=False)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return sum(jnp.square(x).mean() for x in jax.tree.leaves(params)) * batch.mean()  # type: ignore

    alg = hj.decomfl(loss, 0.1)
    state = alg.init(jax.tree.map(jnp.copy, model.params), jax.random.key(0))
    with hj.Ledger.create(tmp_path / "run.sqlite", alg, state) as ledger:
        state, metrics = jax.jit(alg.round)(state, jnp.ones((2, 1, 4)))
        ledger.append(metrics.record, hj.digest(state))
    models.save_pretrained(model, tmp_path / "saved", state.params)
    assert rebuild.rebuild(tmp_path / "run.sqlite", folder, tmp_path / "out").proved
    saved, out = tmp_path / "saved", tmp_path / "out"
    assert small_files(out) == small_files(saved)
    assert "secret" not in str(list(out.rglob("*")))
    assert ((out / "1_Pooling" / "config.json").is_file()) == (make is sentences)
    wanted, found = load_file(saved / "model.safetensors"), {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    assert wanted.keys() == found.keys() and all((wanted[n] == found[n]).all() for n in wanted)
    again = models.from_pretrained(out, progress=False)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state.params), strict=True)
    )


def test_what_an_earlier_run_left_beside_the_weights_is_named(tmp_path: Path):
    assert notes.beside(tmp_path) == notes.beside(None) == []
    (tmp_path / "prefix.safetensors").write_bytes(b"")
    assert notes.beside(tmp_path) == [
        "prefix.safetensors of the model's folder is not read: the run begins at the weights alone"
    ]


@pytest.mark.parametrize("given, mean, deviation", [
    ({}, 0.5, 0.5), ({"do_normalize": False}, 0, 1),
    ({"do_normalize": False, "do_rescale": False}, 0, 1 / 255),
    ({"rescale_factor": 1 / 127.5, "image_mean": [1.0], "image_std": [1.0]}, 0.5, 0.5),
    ({"do_rescale": False, "image_mean": [127.5], "image_std": [127.5]}, 0.5, 0.5),
    ({"image_mean": [0.1], "image_std": [0.3]}, 0.1, 0.3),
])  # fmt: skip
def test_pixels_are_scaled_as_the_folder_says(
    given: dict[str, Any], mean: float, deviation: float, tmp_path: Path
):
    """(pixel * factor - mean) / std, as transformers has it, of pixels that are divided by 255."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    (found_mean,), (found_deviation,) = vision._normalization(tmp_path, 1)
    assert found_mean == pytest.approx(mean) and found_deviation == pytest.approx(deviation)


@pytest.mark.parametrize("factor", [0, -1, "x", None])
def test_a_factor_that_is_none_is_refused(factor: Any, tmp_path: Path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": factor}))
    with pytest.raises(ValueError, match="rescale_factor: expected a number above 0"):
        vision._normalization(tmp_path, 3)
