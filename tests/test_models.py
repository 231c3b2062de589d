"""The encoder against transformers' torch model, folders in and out, and refusals."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    SmolLM3Config,
    ViTConfig,
)

from hiso_jax import models
from hiso_jax._engine import trees
from hiso_jax.models import attention, subsets, torchfile
from hiso_jax.train import finetune
from tests.helpers import random_folder


def batch() -> dict[str, np.ndarray]:
    """Left- and right-padded rows."""
    ids = np.random.default_rng(1).integers(5, 99, (4, 9)).astype(np.int32)
    mask = np.ones((4, 9), np.int32)
    mask[1, 6:], mask[2, :3], mask[3, 1:] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def torch_difference(folder: Path, inputs: dict[str, np.ndarray]) -> float:
    """Largest difference of the hidden states to transformers' torch model."""
    torch = pytest.importorskip("torch", reason="extra 'parity': pip install torch")
    from transformers import BertModel

    reference = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = reference(**{k: torch.tensor(v).long() for k, v in inputs.items()})
    model = models.from_pretrained(folder)
    got = np.asarray(jax.jit(model.apply)(model.params, **inputs))
    return float(
        np.abs((got - wanted.last_hidden_state.numpy()) * inputs["attention_mask"][..., None]).max()
    )


def test_random_model_equals_torch(tmp_path: Path):
    assert torch_difference(random_folder(tmp_path), batch()) < 1e-5


def test_minilm_equals_torch():
    try:
        folder = finetune.bundled_model()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    texts = ["Return the number of bytes.", "x", "Open the file for reading and close the socket."]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="np")
    inputs = {k: np.asarray(tokens[k]) for k in ("input_ids", "attention_mask")}
    assert torch_difference(folder, inputs) < 1e-5


def test_padding_does_not_matter(tmp_path: Path):
    model = models.from_pretrained(random_folder(tmp_path))
    inputs, apply = batch(), jax.jit(model.apply)
    whole = apply(model.params, **inputs)
    cut = apply(model.params, inputs["input_ids"][:, :6], inputs["attention_mask"][:, :6])
    np.testing.assert_allclose(whole[1, :6], cut[1], atol=2e-5)


def test_round_trip_is_exact(tmp_path: Path):
    """Every tensor comes back bit by bit, the ones the encoder does not use too."""
    folder = random_folder(tmp_path / "in")
    models.save_pretrained(models.from_pretrained(folder), tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    model = models.from_pretrained(tmp_path / "out")
    moved = jax.tree.map(lambda x: x + 1, model.params)
    models.save_pretrained(model, tmp_path / "out", moved)
    again = models.from_pretrained(tmp_path / "out").params
    chex.assert_trees_all_equal(again, moved)


def test_layers_are_stacked(tmp_path: Path):
    leaves = trees.select(models.from_pretrained(random_folder(tmp_path)).params)
    assert leaves["encoder/layer/attention/self/query/kernel"].shape == (3, 24, 24)
    assert all(x.dtype == jnp.float32 for x in leaves.values()) and len(leaves) == 21


@pytest.mark.parametrize("spoil, text", [
    (lambda t: t.pop("encoder.layer.1.output.dense.bias"), "missing.*layer.1.output.dense.bias"),
    (lambda t: t.update(extra=np.zeros(2, np.float32)), "unknown tensors.*extra"),
    (lambda t: t.update({"embeddings.LayerNorm.bias": np.zeros(7, np.float32)}), "LayerNorm.bias.*expected"),
])  # fmt: skip
def test_wrong_tensors_are_named(tmp_path: Path, spoil: Any, text: str):
    folder = random_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=text):
        models.from_pretrained(folder)


def test_other_model_types_and_folders_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="expected a folder with config.json"):
        models.from_pretrained(tmp_path / "nothing")
    folder = random_folder(tmp_path)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2' is not supported"):
        models.from_pretrained(folder)


def opt_folder(folder: Path, **options: Any) -> Path:
    """A small random decoder in a Hugging Face folder, made without torch."""
    config = OPTConfig(**dict(
        vocab_size=50, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=30,
    ) | options)  # fmt: skip
    models.save_pretrained(models.from_config(config, jax.random.key(0)), folder)
    return folder


def test_checkpoints_in_several_files_and_by_other_names(tmp_path: Path):
    whole = models.from_pretrained(opt_folder(tmp_path / "whole")).params
    tensors = load_file(tmp_path / "whole/model.safetensors")
    config = (tmp_path / "whole/config.json").read_text()

    def put(name: str, parts: dict[str, dict[str, np.ndarray]]) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        for file, own in parts.items():
            save_file(own, tmp_path / name / file)
        return tmp_path / name

    names = sorted(tensors)
    parts = {f"model-{i}.safetensors": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    sharded = put("sharded", parts)
    index = {"weight_map": {n: file for file, own in parts.items() for n in own}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(models.from_pretrained(sharded).params, whole)
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*model-1.safetensors"):
        models.from_pretrained(sharded)

    bare = {n.removeprefix("model."): x for n, x in tensors.items()}  # saved without a head
    chex.assert_trees_all_equal(
        models.from_pretrained(put("bare", {"model.safetensors": bare})).params, whole
    )
    table = "model.decoder.embed_tokens.weight"
    tied = tensors | {"lm_head.weight": tensors[table]}
    chex.assert_trees_all_equal(
        models.from_pretrained(put("tied", {"model.safetensors": tied})).params, whole
    )
    only = {("lm_head.weight" if n == table else n): x for n, x in tensors.items()}
    chex.assert_trees_all_equal(
        models.from_pretrained(put("only", {"model.safetensors": only})).params, whole
    )
    other = tensors | {"lm_head.weight": tensors[table] + 1}
    with pytest.raises(ValueError, match="the config ties 'lm_head.weight'.*they differ"):
        models.from_pretrained(put("other", {"model.safetensors": other}))


def test_depth_costs_no_compile_time():
    """Layers are scanned: the program of a deep model is as long as that of a shallow one."""

    def program(layers: int) -> str:
        config = OPTConfig(vocab_size=99, hidden_size=32, num_hidden_layers=layers, ffn_dim=48,
                           num_attention_heads=4, word_embed_proj_dim=32)  # fmt: skip

        def fresh(key: jax.Array, tokens: jax.Array) -> jax.Array:
            model = models.from_config(config, key)
            return model.apply(model.params, tokens, tokens)

        return jax.jit(fresh).lower(jax.random.key(0), jnp.ones((1, 4), jnp.int32)).as_text()

    shallow, deep = (program(layers).splitlines() for layers in (2, 24))
    assert len(shallow) == len(deep) > 100


def test_small_files_go_with_the_weights(tmp_path: Path):
    folder = opt_folder(tmp_path / "in")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    model = models.from_pretrained(folder, dtype=jnp.bfloat16)
    models.save_pretrained(model, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json"}  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    chex.assert_trees_all_equal(
        models.from_pretrained(tmp_path / "out", jnp.bfloat16).params, model.params
    )


def test_pytorch_files_are_read_without_pytorch(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="extra 'parity': pip install torch")
    whole = models.from_pretrained(opt_folder(tmp_path)).params
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for kind in (torch.float32, torch.float16):
        given = {n: torch.nn.Parameter(torch.tensor(x).to(kind)) for n, x in tensors.items()}
        torch.save(given, tmp_path / "pytorch_model.bin")
        wanted = whole if kind == torch.float32 else jax.tree.map(
            lambda x: x.astype(jnp.float16).astype(jnp.float32), whole)  # fmt: skip
        chex.assert_trees_all_equal(models.from_pretrained(tmp_path).params, wanted)
    names = sorted(given)
    for i in (0, 1):
        torch.save({n: given[n] for n in names[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
    index = {"weight_map": {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}}
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    chex.assert_trees_all_equal(models.from_pretrained(tmp_path).params, wanted)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("a pickle has run",))


def test_a_pickle_runs_nothing(tmp_path: Path, capsys: Any):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))
    with pytest.raises(ValueError, match="builtins.print has no place in a dict of tensors"):
        torchfile.TorchFile(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="not a dict of tensors saved by PyTorch"):
        torchfile.TorchFile(path)
    assert "has run" not in capsys.readouterr().out


def test_an_old_pickle_runs_nothing(tmp_path: Path, capsys: Any):
    path = tmp_path / "pytorch_model.bin"
    start = [pickle.dumps(x, 2) for x in (torchfile._MAGIC, 1001, {"little_endian": True})]
    for bad in range(4):
        parts = [*start, pickle.dumps({"w": 3}, 2)]
        parts[bad] = pickle.dumps(Evil(), 2)
        path.write_bytes(b"".join(parts))
        with pytest.raises(ValueError, match="print has no place in a dict of tensors"):
            torchfile.TorchFile(path)
    path.write_bytes(b"".join(start).replace(b"\x88", b"\x89") + parts[3])
    with pytest.raises(ValueError, match="big-endian"):
        torchfile.TorchFile(path)
    assert "has run" not in capsys.readouterr().out


SMALL = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
             max_position_embeddings=16)  # fmt: skip
SORTS: dict[str, Any] = {
    "OPT": OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, init_std=0.2),
    "Llama": LlamaConfig(**SMALL, intermediate_size=8, initializer_range=0.2),
    "BERT": BertConfig(**SMALL, intermediate_size=8, initializer_range=0.2),
    "RoBERTa": RobertaConfig(**SMALL, intermediate_size=8, pad_token_id=1, initializer_range=0.2),
}
LIMITS = {"OPT": 16, "Llama": None, "BERT": 16, "RoBERTa": 14}


@pytest.fixture(scope="module", params=SORTS)
def model(request: Any) -> tuple[str, models.Model]:
    return request.param, models.from_config(SORTS[request.param], jax.random.key(0))


def test_tokens_that_a_model_has_no_rows_for(model: Any):
    name, m = model
    ids, mask = np.full((2, 6), 5, np.int32), np.ones((2, 6), np.int32)
    limit = LIMITS[name]
    assert models.positions(m.config) == limit
    calls: list[Callable[..., Any]] = [
        m.apply, m.hidden, lambda p, i, k: m.lower(p, i, k, 1), lambda p, i, k: m.generate(p, i, k, 1)]  # fmt: skip
    calls = calls if name in ("OPT", "Llama") else calls[:3]
    for call in calls:
        for wrong in (20, -1, -100):
            bad = ids.copy()
            bad[1, 2] = wrong
            with pytest.raises(ValueError, match=f"id {wrong} .*table of 20 rows"):
                call(m.params, bad, mask)
        for shapes in ((ids[0], mask[0]), (ids, mask[:, :3]), (ids, mask[:, None])):
            with pytest.raises(ValueError, match="expected (the )?shape"):
                call(m.params, *shapes)
        with pytest.raises(ValueError, match="expected integers"):
            call(m.params, ids.astype(np.float32), mask)
        if limit is not None:
            wide = np.full((1, limit + 1), 5, np.int32)
            text = f"need {limit + 1} positions, the model's table holds {limit}; cut"
            for form in (call, jax.jit(call)):
                with pytest.raises(ValueError, match=text):
                    form(m.params, wide, np.ones_like(wide))


def test_what_is_padding_never_matters(model: Any):
    name, m = model
    run = jax.jit(m.apply)
    ids = np.random.default_rng(0).integers(3, 20, (2, 6)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, :2], mask[1, 4:] = 0, 0
    wanted = np.asarray(run(m.params, ids, mask)) * mask[..., None]
    for padding in (0, 1, 20, 2**30, -1, -100):
        got = np.asarray(run(m.params, np.where(mask > 0, ids, padding), mask)) * mask[..., None]
        np.testing.assert_array_equal(got, wanted)
    # Nor does how much of it there is, of a text that the table is long enough for (which is seen
    # inside jit as well, where the tokens are known).
    side = (0, 20) if name == "BERT" else (20, 0)
    known = [np.pad(x, ((0, 0), side)) for x in (ids, mask)]
    wide = np.asarray(jax.jit(lambda params: m.apply(params, *known))(m.params))
    cut = wide[:, side[0] : side[0] + 6] * mask[..., None]
    np.testing.assert_allclose(cut, wanted, atol=1e-5)
    # A token that the table lacks cannot be refused inside jit: NaN, not another token's row.
    for wrong in (20, -1):
        bad = ids.copy()
        bad[0, 3] = wrong
        assert np.isnan(np.asarray(run(m.params, bad, mask))[0, 3]).all()


def test_prefixes_and_new_tokens_need_positions_too():
    m = models.from_config(SORTS["OPT"], jax.random.key(0))
    ids, mask = np.full((1, 6), 5, np.int32), np.ones((1, 6), np.int32)
    with pytest.raises(ValueError, match="6 tokens, 12 new ones need 17 positions"):
        m.generate(m.params, ids, mask, 12)
    assert jax.eval_shape(lambda p: m.generate(p, ids, mask, 11), m.params).shape == (1, 11)
    prefix = (jnp.zeros((1, 6, 2, 4)),) * 2  # of six tokens
    with pytest.raises(ValueError, match="6 tokens, 6 of a prefix, 6 new ones need 17 positions"):
        m.generate(m.params, ids, mask, 6, prefix=prefix)
    long = np.concatenate([ids, ids], 1)
    with pytest.raises(ValueError, match="12 tokens, 6 of a prefix need 18 positions"):
        m.hidden(m.params, long, np.ones_like(long), prefix)
    with pytest.raises(ValueError, match="17 tokens need 17 positions"):
        m.prefix(m.params, np.full(17, 5))
    with pytest.raises(ValueError, match=r"expected shape \[n\]"):
        m.prefix(m.params, ids)
    bert = models.from_config(SORTS["BERT"], jax.random.key(0))
    with pytest.raises(ValueError, match="generate: only decoders have it, not bert"):
        bert.generate(bert.params, ids, mask, 1)
    assert m.has_head and not bert.has_head


def test_layers_that_a_model_lacks():
    ids, mask = np.full((1, 6), 5, np.int32), np.ones((1, 6), np.int32)
    vision = ViTConfig(**SMALL | {"image_size": 4, "patch_size": 2}, intermediate_size=8)
    for config, given in (
        (SORTS["Llama"], (ids, mask)), (SORTS["BERT"], (ids, mask)),
        (vision, (np.ones((1, 4, 4, 3), np.float32),)),
    ):  # fmt: skip
        m = models.from_config(config, jax.random.key(0))
        stream = jnp.zeros((1, 5 if config is vision else 6, 8))
        for end, begin in ((-1, 0), (2, 0), (0, 1), (1, 2), (1, -1)):
            with pytest.raises(ValueError, match=f"begin={begin} and end={end}: .* <= 1, the"):
                m.lower(m.params, *given, end, stream=stream, begin=begin)
        for begin in (-1, 2):
            with pytest.raises(ValueError, match=f"begin={begin}: expected"):
                m.hidden(m.params, *given, stream=stream, begin=begin)
        for call in (lambda *x: m.hidden(*x, begin=1), lambda *x: m.lower(*x, 1, begin=1)):
            with pytest.raises(ValueError, match="needs the stream that enters layer 1"):
                call(m.params, *given)
    m = models.from_config(SORTS["Llama"], jax.random.key(0))
    with pytest.raises(ValueError, match="prefix: expected none with a stream"):
        prefix = (jnp.zeros((1, 6, 2, 4)),) * 2
        m.hidden(m.params, ids, mask, prefix, stream=jnp.zeros((1, 6, 8)))


def test_only_smollm3_has_layers_without_rotary_positions():
    """Of its list the first count, as transformers reads it."""
    small: dict[str, Any] = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2)
    configs = [kind(**small, no_rope_layers=[0, 1, 1]) for kind in (LlamaConfig, SmolLM3Config)]
    llama, smol = (attention.layer_configs(config)[0] for config in configs)
    assert llama is not None and smol is not None
    assert llama.all() and not smol[0].any() and smol[1].all()


def test_fields_that_a_family_does_not_read_change_nothing():
    """Gemma 3 has `hidden_activation`, Llama's layers are all alike: so does transformers have it."""
    small: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=32,
                                 num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2)  # fmt: skip
    ids, mask = np.arange(9)[None], np.ones((1, 9), np.int32)
    for config, stray in (
        (Gemma3TextConfig(**small, head_dim=8), {"hidden_act": "relu"}),
        (LlamaConfig(**small), {"layer_types": ["sliding_attention"] * 2, "sliding_window": 2}),
    ):
        model = models.from_config(config, jax.random.key(0))
        for name, value in stray.items():
            setattr(config, name, value)
        other = models.from_config(config, jax.random.key(0))
        np.testing.assert_array_equal(
            model.apply(model.params, ids, mask), other.apply(other.params, ids, mask)
        )


def test_what_cannot_be_adapted_is_not_offered_and_nothing_is_not_written():
    small: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=32,
                                 num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    model = models.from_config(LlamaConfig(**small), jax.random.key(0))
    with pytest.raises(ValueError, match="targets: expected some of .*'q_proj'") as error:
        subsets.lora_zeros(model.params, 2, ["lm_head"])
    assert "'lm_head'" not in str(error.value).partition("got")[0]
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"max_new_tokens: expected an int >= 1, got {count}"):
            model.generate(model.params, np.ones((1, 3)), np.ones((1, 3)), count)
