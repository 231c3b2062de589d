"""GGUF files that are not read, in a line; what their metadata means; their tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiso_jax import models
from hiso_jax.ledger import rebuild
from hiso_jax.models import ggufconfig
from hiso_jax.models.gguffile import GGUFFile
from tests import ggufs
from tests.helpers import REVIEWS, refuse
from tests.test_checkpoints import LFS, load, refused
from tests.test_models import random_folder

ROWS = np.zeros((4, ggufs.WIDTH), np.float32)


def said(**fields: Any) -> dict[str, Any]:
    """Metadata ``llama.*``; two underscores stand for a dot."""
    return {f"llama.{key.replace('__', '.')}": x for key, x in fields.items()}


# Name -> what a file is written with, and what is said of it.
FILES: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (dict(said={"general.architecture": "gpt2"}), "'gpt2' is not supported, only .'llama'"),
    "adapter": (dict(said={"general.type": "adapter"}), "of type 'adapter', expected 'model'"),
    "big-endian": (dict(endianess=gguf.GGUFEndian.BIG), "big-endian"),
    "split": (dict(said={"split.count": 3}), "one of 3 parts of a split GGUF .*llama-gguf-split"),
    "quantization": (dict(kind=Kind.Q2_K), "'token_embd.weight' is of type Q2_K, .*only F32, .*Q6_K"),
    "no context": (dict(said=said(context_length=None)), "llama.context_length: expected .* found none"),
    "no heads": (dict(said=said(attention__head_count=None)), "head_count: .* found none"),
    "heads per layer": (dict(said=said(attention__head_count_kv=[2, 2])), "head_count_kv: expected"),
    "no epsilon": (dict(said=said(attention__layer_norm_rms_epsilon=None)), "epsilon: .*> 0, found none"),
    "epsilon": (dict(said=said(attention__layer_norm_rms_epsilon=float("nan"))), "> 0, found nan"),
    "layers": (dict(said=said(block_count=5)), "block_count is 5, there are tensors of 2 layers"),
    "width": (dict(said=said(embedding_length=128)), "embed_tokens.weight' has shape .*expected .any, 128"),
    "heads": (dict(said=said(attention__key_length=32)), "q_proj.weight' has shape .*expected .128, 256"),
    "odd heads": (dict(said=said(attention__head_count=256)), "expected an even number for each of 256"),
    "values": (dict(said=said(attention__value_length=32)), "value_length: only .* 64, .*found 32"),
    "partial rotary": (dict(said=said(rope__dimension_count=32)), "rope.dimension_count: only .*found 32"),
    "words": (dict(said=said(vocab_size=7)), "'model.embed_tokens.weight' has shape .48, 256., expected .7"),
    "yarn": (dict(said=said(rope__scaling__type="yarn")), "scaling.type: 'yarn' is not supported, only"),
    "unknown": (dict(said=said(attention__scale=0.3)), "llama.attention.scale .0.3.* is not supported"),
    "experts": (dict(said=said(expert_count=8)), "llama.expert_count .8. is not supported"),
    "window": (dict(said=said(attention__sliding_window=8)), "llama.attention.sliding_window .8. is not"),
    "both ways": (dict(said=said(attention__causal=False)), "attention.causal .False. is not supported"),
    "factors": (dict(more={"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}),
                "rope_freqs.weight: factors of another rope scaling"),
    "surplus": (dict(more={"blk.0.ffn_gate_inp.weight": ROWS}), "unknown tensors: .'blk.0.ffn_gate_inp"),
    "shape": (dict(more={"blk.1.ffn_up.weight": ROWS}), "up_proj.weight' has shape .4, 256., expected"),
    "bias": (dict(more={"blk.0.attn_q.bias": np.zeros(256, np.float32)}), "tensors missing: .*k_proj.bias"),
    "capped": (dict(family="gemma3", said={"gemma3.final_logit_softcapping": 30.0}), "final_logit_softc"),
    "pattern": (dict(family="gemma3", said={"gemma3.attention.sliding_window_pattern": [True, False]}),
                "sliding_window_pattern: expected 6 of them, found 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_what_is_not_supported_is_named(name: str, tmp_path: Path):
    options, text = FILES[name]
    refused(ggufs.write(tmp_path / "a.gguf", **options), text)


def test_a_missing_tensor_is_named(tmp_path: Path):
    every = ggufs.tensors("qwen2")
    for name, theirs in (("blk.1.ffn_up.weight", "layers.1.mlp.up_proj.weight"),
                         ("token_embd.weight", "model.embed_tokens.weight")):  # fmt: skip
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
        for key, x in ggufs.metadata("qwen2").items():
            getattr(writer, ggufs.WRITE[type(x)])(key, x)
        for other in every.keys() - {name}:
            writer.add_tensor(other, every[other])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / "a.gguf", f"tensors missing: .*{theirs}")


def test_files_that_are_no_gguf(tmp_path: Path):
    path = tmp_path / "a.gguf"
    whole = ggufs.write(path).read_bytes()
    for content, text in (
        (b"", "not a GGUF file: an empty file"), (LFS, "not a GGUF file: a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"), (b"\x80\x02" * 99, "it does not begin as one"),
        (whole[:4] + b"\x01" + whole[5:], "version 1"), (whole[:-1], "truncated .*fetch it again"),
        (whole[:500], "truncated"), (whole[:12], "truncated"), (b"GGUF", "truncated"),
    ):  # fmt: skip
        path.write_bytes(content)
        refused(path, text)


def test_which_file_is_meant(tmp_path: Path):
    one = ggufs.write(tmp_path / "folder/one.gguf")
    load(tmp_path / "folder")
    two = one.with_name("two.GGUF")
    two.write_bytes(one.read_bytes())
    refused(
        one.parent, "expected one GGUF file and no other weights, found one.gguf, two.GGUF; give"
    )
    load(two)
    two.unlink()
    (one.parent / "README.md").write_text("")
    (one.parent / "config.json").write_text("{}")  # the file says all
    load(one.parent)
    random_folder(one.parent)
    refused(one.parent, "found one.gguf, model.safetensors; give the GGUF file itself")
    load(one)
    with pytest.raises(
        FileNotFoundError, match="not/there.gguf: expected a GGUF file, there is none"
    ):
        load(Path("not/there.gguf"))
    said = refuse("replay", "no.sqlite", "not/there.gguf", str(tmp_path / "out"))
    assert "not/there.gguf" in said and said.endswith("exit 1")
    assert rebuild._as_safetensors("a.GGUF") == "model.safetensors"


def config(path: Path, **options: Any) -> dict[str, Any]:
    with GGUFFile(ggufs.write(path, **options)) as file:
        return ggufconfig.config_of(file)


def test_rotary_positions_are_what_the_file_says(tmp_path: Path):
    path, plain = tmp_path / "a.gguf", dict(rope_type="default", rope_theta=5000.0)
    rope = lambda **options: config(path, **options)["rope_parameters"]  # noqa: E731
    assert rope() == plain
    assert rope(said=said(rope__freq_base=None)) == plain | {"rope_theta": 1e4}
    linear = plain | {"rope_type": "linear", "factor": 2.0}
    twice = said(rope__scaling__factor=2.0)
    assert rope(said=twice) == rope(said=said(rope__scale_linear=2.0)) == linear
    assert rope(said=twice | said(rope__scaling__type="linear")) == linear
    assert rope(said=twice | said(rope__scaling__type="none")) == plain
    # As llama.cpp's converter writes the scaling of Llama 3.1.
    frequencies, factors = 5000.0 ** -(np.arange(0, 64, 2) / 64), []
    for wave in 2 * np.pi / frequencies:
        smooth = (8192 / wave - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(1 if wave < 8192 / 4 else 8 if wave > 8192 else between)
    assert 1 in factors and 8 in factors and len(set(factors)) > 2
    assert rope(more={"rope_freqs.weight": np.float32(factors)}) == plain | dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)  # fmt: skip
    assert rope(more={"rope_freqs.weight": np.ones(32, np.float32)}) == plain
    load(ggufs.write(path, more={"rope_freqs.weight": np.float32(factors)}))
    with pytest.raises(ValueError, match="beside a linear rope scaling"):
        rope(said=twice, more={"rope_freqs.weight": np.float32(factors)})


def test_windows_of_gemma_are_what_the_file_says(tmp_path: Path):
    path, key = tmp_path / "a.gguf", "gemma3.attention.sliding_window"
    own = lambda **said: config(path, family="gemma3", said=said)  # noqa: E731
    kinds = lambda letters: [{"s": "sliding_attention", "f": "full_attention"}[c] for c in letters]  # noqa: E731
    usual = own()
    assert usual["layer_types"] == kinds("sssssf") and usual["sliding_window"] == 4
    assert usual["query_pre_attn_scalar"] == usual["head_dim"] == 256
    assert own(**{f"{key}_pattern": 2})["layer_types"] == kinds("sfsfsf")
    by_layer = [True, True, False, False, True, False]
    assert own(**{f"{key}_pattern": by_layer})["layer_types"] == kinds("ssffsf")
    assert own(**{key: None})["layer_types"] == kinds("ffffff")
    ropes = own(**{"gemma3.rope.freq_base_swa": 70.0, "gemma3.rope.scaling.factor": 8.0})
    assert ropes["rope_parameters"] == dict(
        full_attention=dict(rope_type="linear", rope_theta=5000.0, factor=8.0),
        sliding_attention=dict(rope_type="default", rope_theta=70.0))  # fmt: skip


def byte_level() -> tuple[Any, dict[str, Any]]:
    """A tokenizer, and the metadata of a file with it."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [json.dumps(row) for row in REVIEWS],
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
    )
    held = json.loads(bpe._tokenizer.to_str())["model"]
    words = sorted(held["vocab"], key=held["vocab"].get)
    return bpe._tokenizer, {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(words) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in held["merges"]],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


def pieces() -> dict[str, Any]:
    """The metadata of a file with a SentencePiece vocabulary."""
    words = [
        "▁",
        "a",
        "b",
        "d",
        "g",
        "o",
        "t",
        "h",
        "e",
        "▁a",
        "go",
        "goo",
        "good",
        "▁good",
        "th",
        "the",
        "▁the",
    ]
    every = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": every,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip


@pytest.mark.parametrize("family, make", [
    ("llama", lambda: byte_level()[1]), ("qwen2", lambda: byte_level()[1]), ("llama", pieces),
    ("gemma3", pieces)])  # fmt: skip
def test_a_tokenizer_has_the_ids_of_transformers(
    family: str, make: Callable[[], dict[str, Any]], tmp_path: Path
):
    path = ggufs.write(tmp_path / "in/a.gguf", family, said=make())
    ours = models.load_tokenizer(path)
    model = load(path)
    assert model.config.eos_token_id == ours.eos_token_id == 2
    models.save_pretrained(model, tmp_path / "out")
    back = models.load_tokenizer(tmp_path / "out")
    texts = ["good film, a bad</s> one", "the  goat <s>é日\n", ""]
    for text in texts:
        assert back(text)["input_ids"] == ours(text)["input_ids"]
    if make is not pieces:
        bpe = byte_level()[0]
        assert [bpe.encode(t).ids for t in texts[:1]] == [ours(t)["input_ids"] for t in texts[:1]]
    else:
        assert ours("good")["input_ids"][0] == 1 and ours.decode(ours("the goat").input_ids)
    pytest.importorskip("torch", reason="needs torch, of the extra 'parity'")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(theirs, f"{name}_id") is not None and name in ours.special_tokens_map:
            assert getattr(theirs, name) == getattr(ours, name)


@pytest.mark.parametrize("fields, text", [
    ({}, "no tokenizer is in it .*tokenizer.ggml.tokens"),
    ({"tokenizer.ggml.tokens": ["a", "b"]}, "no tokenizer is in it"),
    ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "rwkv"}, "no tokenizer can .*'rwkv'"),
    ({"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "gpt2"}, "no tokenizer can .*'gpt2'"),
])  # fmt: skip
def test_a_tokenizer_that_is_not_in_it(fields: dict[str, Any], text: str, tmp_path: Path):
    path = ggufs.write(tmp_path / "a.gguf", said=fields)
    load(path)
    with pytest.raises(ValueError, match=text) as caught:
        models.load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A file with a tokenizer, its content, and where its numbers begin."""
    path = ggufs.write(tmp_path_factory.mktemp("fuzz") / "a.gguf", kind=Kind.Q8_0, said=pieces())
    return path, path.read_bytes(), gguf.GGUFReader(path).data_offset


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 10**6), edit=st.binary(max_size=9), cut=st.booleans())
def test_damaged_files_are_refused_by_name_or_are_models(
    whole: tuple[Path, bytes, int], place: int, edit: bytes, cut: bool
):
    path, content, header = whole
    place %= len(content) if cut else header
    damaged = content[:place] if cut else content[:place] + edit + content[place + len(edit) :]
    other = path.with_name("b.gguf")
    other.write_bytes(damaged)
    try:
        model = load(other)
    except ValueError as error:
        assert str(other) in str(error)
    else:
        assert not cut and len(model.params) > 0
        try:
            models.load_tokenizer(other)
        except ValueError as error:
            assert str(other) in str(error)
