"""Every family against transformers' own torch model: logits, generation, the way there and back."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hiso_jax import models
from hiso_jax._engine import trees
from tests.helpers import LFS, load, random_folder, refused
from tests.test_vit import SMALL as SMALL_VIT
from tests.test_vit import pixels

torch = pytest.importorskip("torch", reason="needs the extra 'parity': pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

BASE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3)  # fmt: skip
LLAMA = BASE | dict(intermediate_size=44, num_key_value_heads=2)
SCALED = dict(rope_type="llama3", rope_theta=100.0, factor=4.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=16)  # fmt: skip
CASES: dict[str, Any] = {
    "OPT": ("OPT", BASE | dict(ffn_dim=48, word_embed_proj_dim=32)),
    "OPT, post-norm and projections (350m)": (
        "OPT", BASE | dict(ffn_dim=48, word_embed_proj_dim=20, do_layer_norm_before=False)),
    "OPT, no biases, GELU": (
        "OPT", BASE | dict(ffn_dim=48, word_embed_proj_dim=32, enable_bias=False,
                           layer_norm_elementwise_affine=False, activation_function="gelu")),
    "Llama, tied": ("Llama", LLAMA | dict(tie_word_embeddings=True)),
    "Llama, grouped queries, biases": (
        "Llama", LLAMA | dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "Llama 3 rope scaling, wide heads": ("Llama", LLAMA | dict(rope_parameters=SCALED, head_dim=16)),
    "Llama, linear rope scaling": (
        "Llama", LLAMA | dict(rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=2.0))),
    "Qwen2": ("Qwen2", LLAMA | dict(tie_word_embeddings=False)),
    "Qwen2, sliding window": (
        "Qwen2", LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=2)),
    "Qwen3": ("Qwen3", LLAMA | dict(head_dim=12, tie_word_embeddings=True)),
    "Gemma 3": (
        "Gemma3", LLAMA | dict(head_dim=12, sliding_window=4, query_pre_attn_scalar=20,
                               layer_types=["sliding_attention", "full_attention"] * 2)),
    "SmolLM3": ("SmolLM3", LLAMA | dict(no_rope_layer_interval=3)),
}  # fmt: skip
ENCODERS: dict[str, Any] = {
    "BERT": ("Bert", BASE | dict(intermediate_size=44, type_vocab_size=2)),
    "RoBERTa": ("Roberta", BASE | dict(intermediate_size=44, type_vocab_size=1)),
}
VITS: dict[str, dict[str, Any]] = {
    "ViT": {},
    "ViT, not square, gray, no biases": dict(
        image_size=[16, 24], patch_size=[4, 8], num_channels=1, qkv_bias=False),
}  # fmt: skip


def reference(case: tuple[str, dict[str, Any]], folder: Path, causal: bool = True) -> Any:
    """A random torch model, also in a folder; norms and biases are random too."""
    family, options = case
    suffix = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config = getattr(transformers, suffix)(**options, attn_implementation="eager")
    name = f"{family}ForCausalLM" if causal else f"{family}Model"
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            centre = 0.0 if family == "Gemma3" else centre
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def batch(side: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(5, 97, (3, 11)).astype(np.int32)
    mask = np.ones_like(ids)
    for row, count in enumerate((0, 3, 7)):
        span = slice(0, count) if side == "left" else slice(11 - count, 11)
        ids[row, span], mask[row, span] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def long(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {k: torch.tensor(v).long() for k, v in inputs.items()}


def difference(model: Any, wanted: Any, inputs: dict[str, np.ndarray], apply: Any = None) -> float:
    apply = jax.jit(model.apply) if apply is None else apply
    got = np.asarray(apply(model.params, **inputs))
    assert got.shape == wanted.shape
    return float(np.abs((got - wanted.numpy()) * inputs["attention_mask"][..., None]).max())


LIKE = ("Llama, tied", "Qwen2")  # other cases have all of theirs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE)) for n in CASES]
)
def test_decoder(name: str, tmp_path: Path):
    theirs = reference(CASES[name], tmp_path / "in")
    ours = models.from_pretrained(tmp_path / "in")
    apply = jax.jit(ours.apply)
    for side in ("left", "right"):
        inputs = batch(side)
        with torch.no_grad():
            wanted = theirs(**long(inputs)).logits
        assert wanted.std() > 0.1
        found = difference(ours, wanted, inputs, apply)
        print(f"{name}, padded {side}: {found:.1e} of logits up to {wanted.abs().max():.1f}")
        assert found < 1e-5

    inputs = batch("left")
    with torch.no_grad():
        wanted = theirs.generate(**long(inputs), max_new_tokens=9, do_sample=False)[:, 11:].numpy()
    run = jax.jit(ours.generate, static_argnums=3)
    got = np.asarray(run(ours.params, *inputs.values(), 9, jnp.array([3]), 1))
    np.testing.assert_array_equal(got[:, : wanted.shape[1]], wanted)
    moved = {k: np.stack([np.roll(row, -count) for row, count in zip(x, (0, 3, 7), strict=True)])
             for k, x in inputs.items()}  # fmt: skip
    other = np.asarray(run(ours.params, *moved.values(), 9, jnp.array([3]), 1))
    np.testing.assert_array_equal(other, got)  # the side of the padding does not matter

    models.save_pretrained(ours, tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out")
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("headed", [False, True])
def test_encoder(name: str, headed: bool, tmp_path: Path):
    family = ENCODERS[name][0]
    theirs = reference(ENCODERS[name], tmp_path, causal=False)
    if headed:  # the same weights under the prefix of a class with a head
        whole = getattr(transformers, f"{family}ForSequenceClassification")(theirs.config)
        getattr(whole, family.lower()).load_state_dict(theirs.state_dict(), strict=False)
        tensors = {k: v for k, v in whole.state_dict().items() if "classifier" not in k}
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / "model.safetensors")
    ours = models.from_pretrained(tmp_path)
    for side in ("right",) if name == "BERT" else ("left", "right"):
        inputs = batch(side)
        with torch.no_grad():
            wanted = theirs(**long(inputs)).last_hidden_state
        found = difference(ours, wanted, inputs)
        print(f"{name}, padded {side}: {found:.1e} of states up to {wanted.abs().max():.1f}")
        assert found < 1e-5


@pytest.mark.parametrize("name", VITS)
def test_vit(name: str, tmp_path: Path):
    config = transformers.ViTConfig(**SMALL_VIT | VITS[name], attn_implementation="eager")
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    ours, given = load(tmp_path / "in"), pixels(config)
    with torch.no_grad():
        wanted = theirs(torch.tensor(given.transpose(0, 3, 1, 2))).logits.numpy()
    got = np.asarray(jax.jit(ours.apply)(ours.params, given))
    found, largest = np.abs(got - wanted).max(), np.abs(wanted).max()
    print(f"{name}: {found:.1e} of logits up to {largest:.1f}")
    assert wanted.std() > 0.1 and found < 1e-5 * largest

    models.save_pretrained(ours, tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out")
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load_file(tmp_path / "in/model.safetensors").keys() == (
        load_file(tmp_path / "out/model.safetensors").keys())  # fmt: skip

    bare = transformers.ViTModel(config)  # with a pooler, which is kept, and without a classifier
    bare.load_state_dict(theirs.vit.state_dict(), strict=False)
    bare.save_pretrained(tmp_path / "bare")
    headless = load(tmp_path / "bare")
    assert not headless.has_head and headless.untouched.keys() == {
        "pooler.dense.weight", "pooler.dense.bias"}  # fmt: skip
    hidden = headless.apply(headless.params, given)
    np.testing.assert_array_equal(hidden, headless.hidden(headless.params, given))
    np.testing.assert_allclose(ours.head(ours.params, hidden), got, atol=1e-5 * largest)
    with pytest.raises(ValueError, match="came without a classifier"):
        headless.head(headless.params, hidden)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(dtype: Any, tmp_path: Path):
    theirs = reference(CASES["Qwen3"], tmp_path)
    ours = models.from_pretrained(tmp_path, dtype=dtype)
    assert all(x.dtype == dtype for x in trees.named(ours.params).values())
    inputs = batch("right")
    with torch.no_grad():
        wanted = theirs(**long(inputs)).logits
    scale = float(wanted.abs().max())
    assert difference(ours, wanted, inputs) < scale * (0.05 if dtype == jnp.bfloat16 else 0.01)


def test_rows_of_the_head_are_those_of_the_logits(tmp_path: Path):
    reference(CASES["Llama, tied"], tmp_path)
    ours, inputs = models.from_pretrained(tmp_path), batch("right")
    hidden = jax.jit(ours.hidden)(ours.params, **inputs)
    some = ours.head(ours.params, hidden[:, -1], jnp.array([7, 3]))
    whole = jax.jit(ours.apply)(ours.params, **inputs)
    np.testing.assert_allclose(some, whole[:, -1][:, jnp.array([7, 3])], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["OPT", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Gemma 3", "Qwen3"))]
)
def test_a_prefix_is_the_text_it_came_from(name: str, tmp_path: Path):
    reference((CASES[name][0], CASES[name][1] | {"sliding_window": 64}), tmp_path)
    ours, inputs = models.from_pretrained(tmp_path), batch("left")
    text = jnp.array([7, 8, 9])
    prefix, hidden = ours.prefix(ours.params, text), jax.jit(ours.hidden)
    generate = jax.jit(ours.generate, static_argnums=3)
    got = hidden(ours.params, **inputs, prefix=prefix)
    joined = [np.concatenate([row[: 11 - n], text, row[11 - n :]]) for row, n in
              zip(inputs["input_ids"], inputs["attention_mask"].sum(1), strict=True)]  # fmt: skip
    mask = np.concatenate([inputs["attention_mask"], np.ones((3, 3), np.int32)], 1)
    mask = np.sort(mask, 1)  # padding stays on the left
    wanted = hidden(ours.params, jnp.asarray(np.stack(joined)), jnp.asarray(mask))
    real = inputs["attention_mask"][..., None] > 0
    np.testing.assert_allclose(np.where(real, got, 0), np.where(real, wanted[:, 3:], 0), atol=2e-4)
    tokens = generate(ours.params, *inputs.values(), 5, prefix=prefix)
    whole = generate(ours.params, jnp.asarray(np.stack(joined)), jnp.asarray(mask), 5)
    np.testing.assert_array_equal(tokens, whole)


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_language_model_head(name: str, tmp_path: Path):
    family, options = ENCODERS[name]
    config = getattr(transformers, f"{family}Config")(**options, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "in")
    ours, inputs = models.from_pretrained(tmp_path / "in"), batch("right")
    with torch.no_grad():
        wanted = theirs(**long(inputs)).logits.numpy()
    hidden = ours.hidden(ours.params, **inputs)
    real = inputs["attention_mask"][..., None]
    assert np.abs((np.asarray(ours.head(ours.params, hidden)) - wanted) * real).max() < 1e-5
    some = ours.head(ours.params, hidden[:, 2], jnp.array([9, 4]))
    np.testing.assert_allclose(some, wanted[:, 2][:, [9, 4]], atol=1e-5)
    models.save_pretrained(ours, tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("archive", [True, False])
def test_pytorch_files_new_and_old(archive: bool, tmp_path: Path):
    path = random_folder(tmp_path) / "pytorch_model.bin"
    plain = load_file(tmp_path / "model.safetensors")
    wanted = load(tmp_path).params
    (tmp_path / "model.safetensors").unlink()
    tensors = {n: torch.tensor(x) for n, x in plain.items()}

    def save(content: Any) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=archive)

    flat, views, start = torch.cat([x.reshape(-1) for x in tensors.values()]), {}, 0
    for name, x in tensors.items():
        views[name], start = flat[start : start + x.numel()].view(x.shape), start + x.numel()
    kept = {"epoch": 3, "optimizer": {"state": {0: {"m": flat}}, "param_groups": [{"lr": 0.1}]}}
    turned = {n: x.t().contiguous().t() if x.ndim == 2 else x for n, x in tensors.items()}
    parameters = {n: torch.nn.Parameter(x) for n, x in tensors.items()}
    for content in (tensors, parameters, views, turned, {"state_dict": tensors} | kept):
        save(content)
        chex.assert_trees_all_equal(load(tmp_path).params, wanted)
    one = "encoder.layer.1.output.dense.bias"
    save(tensors | {one: torch.ones(1).expand(24)})
    assert (load(tmp_path).params["encoder"]["layer"]["output"]["dense"]["bias"][1] == 1).all()
    for content, text in {
        "mixed": (tensors | {"epoch": 3}, "'epoch'. are no named tensors"),
        "two": ({"model": tensors, "ema": tensors}, "several dicts of tensors, .'model', 'ema'"),
        "none": (kept, "no tensors"),
        "tensor": (flat, "expected a dict of tensors, found a tensor"),
        "module": (torch.nn.Linear(2, 2), "Linear has no place"),
        "bytes": ({n: x.to(torch.int8) for n, x in tensors.items()}, "int8.*quantized"),
        "small": ({n: x.to(torch.float8_e4m3fn) for n, x in tensors.items()}, "a quantized"),
    }.values():
        save(content)
        refused(tmp_path, text)
    save(tensors)
    whole = path.read_bytes()
    for count in (len(whole) - 3, len(whole) // 2, 300, 20):
        path.write_bytes(whole[:count])
        refused(tmp_path, "truncated")
    path.write_bytes(LFS)
    refused(tmp_path, "Git LFS pointer")
    save_file(plain, path)
    refused(tmp_path, "should be called model.safetensors")
