"""Checkpoints as they are found: odd ones load right, others are refused in a line, nothing done."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, BertConfig, Gemma3TextConfig, LlamaConfig, OPTConfig

from hiso_jax import models
from tests.helpers import LFS, load, random_folder, refused

Tensors = dict[str, Any]
WIDTH, WORDS = 24, 99  # of random_folder


def put(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """A folder of these tensors, its config changed; None takes a field out."""
    random_folder(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text()) | config
    said = {k: x for k, x in said.items() if x is not None}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def old(name: str) -> str:
    """As TensorFlow called it, and bert-base is published."""
    name = re.sub("LayerNorm.weight", "LayerNorm.gamma", name)
    return re.sub("LayerNorm.bias", "LayerNorm.beta", name)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return load_file(random_folder(tmp_path_factory.mktemp("plain")) / "model.safetensors")


@pytest.fixture(scope="module")
def head() -> Tensors:
    rng, part = np.random.default_rng(3), "cls.predictions."
    shapes = {"bias": (WORDS,), "transform.dense.weight": (WIDTH, WIDTH)}
    shapes |= dict.fromkeys(("transform.dense.bias", "transform.LayerNorm.weight",
                             "transform.LayerNorm.bias"), (WIDTH,))  # fmt: skip
    return {part + n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def test_names_that_checkpoints_have(tmp_path: Path, plain: Tensors):
    wanted = load(put(tmp_path / "plain", plain)).params
    table = "embeddings.word_embeddings.weight"
    named = {
        "old": {old(n): x for n, x in plain.items()},
        "prefixed": {f"bert.{n}": x for n, x in plain.items()},
        "published": {f"bert.{old(n)}": x for n, x in plain.items()},
        "table under its copy's name": {
            "cls.predictions.decoder.weight" if n == table else n: x for n, x in plain.items()},
        "double precision": {n: x.astype(np.float64) for n, x in plain.items()},
    }  # fmt: skip
    for name, tensors in named.items():
        model = load(put(tmp_path / name, tensors))
        chex.assert_trees_all_equal(model.params, wanted)
        models.save_pretrained(model, tmp_path / "back")
        assert load_file(tmp_path / "back/model.safetensors").keys() == tensors.keys()


CLASSES = [["BertForMaskedLM"], ["BertForPreTraining"], [], None]


def test_a_head_is_told_by_its_tensors(tmp_path: Path, plain: Tensors, head: Tensors):
    table = plain["embeddings.word_embeddings.weight"]
    others = {"cls.seq_relationship.weight": np.zeros((2, WIDTH), np.float32),
              "cls.predictions.decoder.weight": table}  # fmt: skip
    whole = {f"bert.{n}": x for n, x in plain.items()} | head | others
    wanted = load(put(tmp_path / "named", whole, architectures=CLASSES[0]))
    hidden = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)
    logits = wanted.head(wanted.params, hidden)
    for i, classes in enumerate(CLASSES):
        for rename in (str, old):
            tensors = {rename(n): x for n, x in whole.items()}
            model = load(put(tmp_path / f"{i} {rename.__name__}", tensors, architectures=classes))
            assert model.has_head
            np.testing.assert_array_equal(model.head(model.params, hidden), logits)
        bare = load(put(tmp_path / f"{i} bare", plain, architectures=classes))
        assert not bare.has_head and not {"cls", "lm_head"} & bare.params.keys()
        with pytest.raises(ValueError, match="without a masked-language-model head"):
            bare.head(bare.params, hidden)
    # A tied bias that was saved under the name of its copy only.
    moved = {n.replace("predictions.bias", "predictions.decoder.bias"): x for n, x in whole.items()}
    chex.assert_trees_all_equal(load(put(tmp_path / "moved", moved)).params, wanted.params)
    for name in head:
        part = {n: x for n, x in whole.items() if n != name}
        folder = put(tmp_path / f"without {name}", part, architectures=CLASSES[1])
        refused(folder, f"missing: .*'{name}'.*only a part")


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


QUERY = "encoder.layer.1.attention.self.query.weight"
ODD: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "classifier": (lambda t: t | {"classifier.weight": zeros(2, WIDTH)}, "unknown.*of a classifier"),
    "score": (lambda t: t | {"score.weight": zeros(2, WIDTH)}, "unknown.*of a classifier"),
    "answers": (lambda t: t | {"qa_outputs.bias": zeros(2)}, "unknown.*question-answering head"),
    "adapters": (lambda t: t | {"encoder.layer.0.output.lora_A.weight": zeros(2, 2)}, "merged"),
    "other family": (lambda t: t | {"cls.more.weight": zeros(3, 3)}, "head of another family"),
    "wrapped": (lambda t: {f"module.{n}": x for n, x in t.items()}, "missing.*inside the wrapper"),
    "both names": (lambda t: t | {"embeddings.LayerNorm.gamma": zeros(WIDTH)}, "unknown.*gamma"),
    "bytes": (lambda t: t | {QUERY: zeros(WIDTH, WIDTH, dtype=np.int8)}, f"{QUERY}.*int8.*quantized"),
    "packed": (lambda t: t | {QUERY: zeros(288, 1, dtype=np.uint8), f"{QUERY}.absmax": zeros(9)},
               "absmax.*quantized"),
    "scales": (lambda t: t | {f"{QUERY}_scale_inv": zeros(1, 1)}, "scale_inv.*quantized"),
    "codes": (lambda t: {n: x for n, x in t.items() if n != QUERY} | {
        QUERY.replace("weight", "qweight"): zeros(3, 24, dtype=np.int32)}, "qweight.*quantized"),
    "shape": (lambda t: t | {QUERY: zeros(WIDTH, 7)}, r"\(24, 7\), expected \(24, 24\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_tensors_of_something_else_are_named(name: str, tmp_path: Path, plain: Tensors):
    spoil, text = ODD[name]
    refused(put(tmp_path, spoil(dict(plain))), text)


def test_an_untied_head_is_no_table(tmp_path: Path):
    config = LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, intermediate_size=8,
                         num_attention_heads=2, tie_word_embeddings=False)  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    refused(tmp_path, "missing: .'model.embed_tokens.weight'")


def header(kind: str) -> bytes:
    entry = {"w": {"dtype": kind, "shape": [4], "data_offsets": [0, 4]}}
    text = json.dumps(entry).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


FILES = {
    "pointer": (LFS, "Git LFS pointer, .*git lfs pull"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
    "empty": (b"", "an empty file"),
    "gguf": (b"GGUF\x03\0\0\0 and more", "a GGUF file"),
    "torch": (b"PK\x03\x04\0\0\x08\x08 and more", "called pytorch_model.bin"),
    "cut in its header": (header("F32")[:30], "truncated, a header of"),
    "too short for its shape": (header("F32"), "not a safetensors file: tensor 'w' of shape"),
    "words": (header("C64"), "tensor 'w' has type C64: unsupported"),
} | {kind: (header(kind), f"'w' has type {kind}: a quantized checkpoint, .*unquantized one")
     for kind in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4")}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_weights(name: str, tmp_path: Path):
    content, text = FILES[name]
    random_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, text)


def test_a_truncated_file_is_found_when_it_is_opened(tmp_path: Path):
    path = random_folder(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    refused(tmp_path, f"truncated .*expected {len(whole):,} bytes, found {len(whole) - 3:,}")


CONFIGS = {
    "cut": (b'{"model_type": ', "config.json: not JSON"),
    "list": (b"[1]", "config.json: expected a JSON object, found a list"),
    "pointer": (LFS, "config.json: not JSON: a Git LFS pointer"),
    "empty": (b"", "config.json: not JSON: an empty file"),
    "no type": (b'{"hidden_size": 3}', "config.json: lacks model_type"),
    "other type": (b'{"model_type": "gpt2"}', "'gpt2' is not supported"),
    "wrong field": (b'{"model_type": "bert", "hidden_size": "24"}', "not a config: .*hidden_size"),
    "fp8": (b'{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}',
            r"\(fp8\): a quantized checkpoint, .*unquantized"),
    "no method": (b'{"model_type": "llama", "quantization_config": {"load_in_4bit": true}}',
                  "load_in_4bit.*a quantized checkpoint"),
    "packed": (b'{"model_type": "llama", "compression_config": {"format": "pack-quantized"}}',
               "pack-quantized.*a quantized checkpoint"),
    "decoder": (b'{"model_type": "bert", "is_decoder": true}', "is_decoder is not supported"),
    "relative": (b'{"model_type": "bert", "position_embedding_type": "relative_key"}', "relative_k"),
    "activation": (b'{"model_type": "opt", "activation_function": "quick_gelu"}', "quick_gelu"),
    "both ways": (b'{"model_type": "gemma3_text", "use_bidirectional_attention": true}', "bidirect"),
    "an encoder": (b'{"model_type": "qwen2", "is_causal": false}', "is_causal is false"),
    "no window": (b'{"model_type": "qwen3", "num_hidden_layers": 1, "sliding_window": null, '
                  b'"layer_types": ["sliding_attention"]}', "sliding_window: expected a number"),
    "capped": (b'{"model_type": "gemma3_text", "final_logit_softcapping": 30.0}', "softcapping"),
    "rope": (b'{"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}', "yarn"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_what_is_not_supported(name: str, tmp_path: Path):
    content, text = CONFIGS[name]
    (random_folder(tmp_path) / "config.json").write_bytes(content)
    refused(tmp_path, text)


def test_folders_that_hold_no_model(tmp_path: Path):
    whole = random_folder(tmp_path / "whole")
    with pytest.raises(ValueError, match="found a file; give the folder it is in"):
        load(whole / "model.safetensors")
    empty, outer, adapter = (tmp_path / n for n in ("empty", "outer", "adapter"))
    empty.mkdir()
    refused(empty, "expected a folder with config.json, the folder is empty", FileNotFoundError)
    random_folder(outer / "snapshots/1")
    refused(outer, "perhaps you mean .*snapshots/1", FileNotFoundError)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "facebook/opt-125m"}')
    refused(adapter, "an adapter .*'facebook/opt-125m'.*merge")
    (whole / "adapter_config.json").write_text("{}")
    load(whole)  # what is left of an adapter that was merged
    (whole / "adapter_model.safetensors").write_bytes(b"")
    refused(whole, "an adapter .*beside the weights")
    for name in ("adapter_model.safetensors", "model.safetensors"):
        (whole / name).unlink()
    refused(whole, "expected .*model.safetensors .*found adapter_config.json", FileNotFoundError)
    (whole / "tf_model.h5").write_bytes(b"")
    refused(whole, "found only ..tf_model.h5", FileNotFoundError)
    for dtype in ("float8", "int32", None, "float64"):
        with pytest.raises(ValueError, match=f"dtype: expected one of .*bfloat16.*got '?{dtype}"):
            models.from_pretrained(whole, dtype=dtype)


def sharded(folder: Path, tensors: Tensors) -> Path:
    put(folder, tensors)
    (folder / "model.safetensors").unlink()
    where = {n: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, n in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in tensors if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_what_was_saved_into_a_folder_of_shards_comes_back(tmp_path: Path, plain: Tensors):
    folder = sharded(tmp_path / "shards", plain)
    index = folder / "model.safetensors.index.json"
    model = load(folder)
    saved = jax.tree.map(lambda x: x + 1, model.params)
    # An index may name anything: no other file than shards may go with it.
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"a": "config.json", "b": "model.txt"}}))
    (folder / "model.txt").write_text("")
    models.save_pretrained(model, folder, saved)
    chex.assert_trees_all_equal(load(folder).params, saved)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "model.txt"]  # fmt: skip
    for broken in ("{", '{"weight_map": {"a": "../whole"}}'):
        index.write_text(broken)
        models.save_pretrained(model, folder)
        assert not index.exists()
        chex.assert_trees_all_equal(load(folder).params, model.params)


def test_one_file_comes_before_an_index(tmp_path: Path, plain: Tensors):
    folder = sharded(tmp_path, {n: x + 1 for n, x in plain.items()})
    save_file(plain, folder / "model.safetensors")
    wanted = load(put(tmp_path / "plain", plain)).params
    chex.assert_trees_all_equal(load(folder).params, wanted)
    for part in folder.glob("model-*"):
        part.unlink()
    chex.assert_trees_all_equal(load(folder).params, wanted)


@pytest.mark.parametrize("content, text", [
    ("{", "not JSON"), ("[]", "found a list"), ('{"metadata": {}}', "expected weight_map"),
    ('{"weight_map": {}}', "expected weight_map"), ('{"weight_map": {"a": 3}}', "expected weight_map"),
    ('{"weight_map": {"a": "../b.safetensors"}}', "expected weight_map"),
])  # fmt: skip
def test_an_index_that_is_broken(content: str, text: str, tmp_path: Path):
    (random_folder(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, f"model.safetensors.index.json: .*{text}")


def test_a_tensor_in_two_shards(tmp_path: Path, plain: Tensors):
    folder = sharded(tmp_path, plain)
    one, two = sorted(folder.glob("model-*"))
    save_file(load_file(one) | dict([next(iter(load_file(two).items()))]), one)
    refused(folder, "is in model-00001-of-00002.safetensors and in model-00002")


def test_a_config_keeps_what_others_wrote(tmp_path: Path, plain: Tensors):
    fields = dict(architectures=["BertModel"], torch_dtype="float16", gradient_checkpointing=False,
                  transformers_version="4.6.0", position_embedding_type="absolute")  # fmt: skip
    folder = put(tmp_path / "in", plain, **fields)
    said = json.loads((folder / "config.json").read_text())
    model = load(folder, dtype=jnp.bfloat16)
    models.save_pretrained(model, tmp_path / "out")
    out = json.loads((tmp_path / "out/config.json").read_text())
    assert out == said | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    model.config.pad_token_id = 7
    models.save_pretrained(model, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == out | {"pad_token_id": 7}


TINY = dict(vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=8, num_key_value_heads=1, head_dim=4)  # fmt: skip
THREE = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0,
             high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=50.0, factor=2.0)
LAYERS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("config, older", [
    (LlamaConfig(**TINY, rope_parameters=dict(rope_type="default", rope_theta=5e5)),
     dict(rope_theta=5e5, rope_scaling=None)),
    (LlamaConfig(**TINY, rope_parameters=THREE),
     dict(rope_theta=100.0, rope_scaling={k: x for k, x in THREE.items() if k != "rope_theta"})),
    (Gemma3TextConfig(**TINY, layer_types=LAYERS, rope_parameters=dict(
        full_attention=LINEAR, sliding_attention=dict(rope_type="default", rope_theta=7.0))),
     dict(rope_theta=50.0, rope_scaling=dict(rope_type="linear", factor=2.0),
          rope_local_base_freq=7.0)),
], ids=["plain", "llama3", "gemma3"])  # fmt: skip
def test_rotary_positions_are_said_as_transformers_4_reads_them(
    config: Any, older: dict[str, Any], tmp_path: Path
):
    models.save_pretrained(models.from_config(config, jax.random.key(0)), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {k: said[k] for k in older} == older
    ours = lambda c: {k: x for k, x in c.to_dict().items() if k not in ("_name_or_path", "dtype")}  # noqa: E731
    assert ours(AutoConfig.from_pretrained(tmp_path)) == ours(config)
    # As transformers 4 wrote it; saved again, it stays like that.
    del said["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = load(tmp_path)
    assert model.config.rope_parameters == config.rope_parameters
    models.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == said


def test_saving_is_refused_before_anything_is_written(tmp_path: Path, plain: Tensors):
    model = load(put(tmp_path / "in", plain))
    with pytest.raises(
        ValueError, match="params: expected the leaves of the model, .*embeddings.*got .*more/"
    ):
        models.save_pretrained(model, tmp_path / "out", {"more": model.params})
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder to write into, found a file"):
        models.save_pretrained(model, tmp_path / "file")
    (tmp_path / "in").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="is gone: the tokenizer does not go with"):
        models.save_pretrained(model, tmp_path / "out")  # hours of work must not end here
    chex.assert_trees_all_equal(load(tmp_path / "out").params, model.params)


TOKENIZERS: dict[str, tuple[Any, dict[str, bytes], str]] = {
    "none, BERT": (BertConfig, {}, "only special tokens .*no files of one.*copy tokenizer.json"),
    "none, OPT": (OPTConfig, {}, "only special tokens"),
    "none, Llama": (LlamaConfig, {}, "no files of one; copy tokenizer.json"),
    "broken": (OPTConfig, {"tokenizer.json": b'{"a": '}, "no tokenizer loads from tokenizer.json"),
    "other": (OPTConfig, {"tokenizer.json": b"{}"}, "no tokenizer loads from tokenizer.json"),
    "pointer": (OPTConfig, {"tokenizer.json": LFS}, "tokenizer.json: a Git LFS pointer"),
    "config only": (OPTConfig, {"tokenizer_config.json": b'{"tokenizer_class": "NoSuch"}'},
                    "no tokenizer loads from tokenizer_config.json"),
    "no merges": (OPTConfig, {"vocab.json": b'{"a": 0}'}, "without merges.txt"),
    "pieces": (LlamaConfig, {"tokenizer.model": b"\n\x0bjunk"}, "no tokenizer loads.*sentencepiece"),
    "no words": (BertConfig, {"vocab.txt": b""}, "only special tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_not_there(name: str, tmp_path: Path):
    config, files, text = TOKENIZERS[name]
    (tmp_path / "config.json").write_text(config().to_json_string())
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=text) as caught:
        models.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_there(tmp_path: Path):
    (tmp_path / "config.json").write_text(BertConfig().to_json_string())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    assert models.load_tokenizer(tmp_path)("b a")["input_ids"] == [2, 6, 5, 3]
