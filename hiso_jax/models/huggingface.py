"""Hugging Face folders in and out: every tensor used once, every leaf filled, or an error."""

import json
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from hiso_jax import files, trees
from hiso_jax.models import bert, decoder, torchfile
from hiso_jax.tensorfile import Tensor, TensorFile

_FAMILIES: dict[str, Any] = {"bert": bert.Bert, "roberta": bert.Bert} | dict.fromkeys(
    ("opt", "llama", "qwen2", "qwen3", "gemma3_text", "smollm3"), decoder.Decoder
)
# Buffers that old checkpoints hold and no model reads; the pooler is not part of the encoder.
_UNUSED = re.compile(
    r"(^|\.)(pooler\.|seq_relationship\.|position_ids$|rotary_emb\.inv_freq$|masked_bias$)"
)
# Copies of the embeddings under the names of heads that are tied to them.
_TIED = ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
_TABLES = ("embed_tokens.weight",)
_TIED_BIASES = ("lm_head.decoder.bias", "cls.predictions.decoder.bias")
_PREFIXES = ("model.", "bert.", "roberta.")
SMALL_FILES = (".json", ".txt", ".model", ".jinja")
"""Suffixes of the small files of a folder (tokenizer, generation) that go with the weights."""


class Model(NamedTuple):
    """A pretrained model as data and pure functions.

    Attributes:
      config: the transformers config.
      params: nested dict of arrays; layers are stacked along the first axis.
      apply: ``(params, input_ids [B, T], attention_mask [B, T])`` -> logits [B, T, V], or, for
        encoders, hidden states [B, T, D].
      hidden: as `apply`, -> hidden states [B, T, D].
        ``stream`` and ``begin`` go on from what `lower` gave.
      lower: ``(params, input_ids, attention_mask, end) -> [B, T, D]``, the input of layer `end`.
      head: ``(params, hidden [..., D], rows=None) -> logits [..., V or rows]``; of encoders only
        those that come with a masked-language-model head.
      generate: ``(params, input_ids, attention_mask, max_new_tokens, stop=(), pad=0,
        prefix=None) -> int32 [B, max_new_tokens]``, the most probable tokens; decoders only.
      prefix: ``(params, input_ids [n]) -> keys and values [L, n, ...]`` that `hidden` and
        `generate` can put before every row; decoders only.
      source: the folder it came from, or None.
      untouched: tensors of the checkpoint that are not used, by their own names.
      renamed: tensors that the checkpoint has by other names than `tensor_names` gives.
    """

    config: Any
    params: trees.Params
    apply: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    lower: Callable[..., jax.Array]
    head: Callable[..., jax.Array]
    generate: Callable[..., jax.Array]
    prefix: Callable[..., tuple[jax.Array, jax.Array]]
    source: Path | None
    untouched: dict[str, np.ndarray]
    renamed: dict[str, str]


def tensor_names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that a leaf is made of: one, or one a layer.

    Example:
      >>> tensor_names("pooler/dense/kernel", 2), tensor_names("a/layers/norm/bias", 2)
      (['pooler.dense.weight'], ['a.layers.0.norm.bias', 'a.layers.1.norm.bias'])
    """
    *module, last = leaf.split("/")
    name = ".".join([*module, last if last == "bias" else "weight"])
    if not _stacked(leaf):
        return [name]
    return [re.sub(r"\.(layers?)\.", rf".\1.{i}.", f".{name}", count=1)[1:] for i in range(layers)]


def find(name: str, there: Container[str]) -> str | None:
    """Return the name by which a checkpoint has a tensor.

    With or without the prefix of the class that saved it; a tied embedding may be there under
    the name of the head only.
    """
    short = name.removeprefix("model.")
    names = [name, short, *(prefix + name for prefix in _PREFIXES)]
    if short.endswith(_TABLES):
        names.append("lm_head.weight")
    return next((own for own in names if own in there), None)


def is_turned(leaf: str) -> bool:
    """Whether Hugging Face has it transposed: dense kernels are [out, in] there."""
    return leaf.endswith("/kernel")


def _stacked(leaf: str) -> bool:
    return "/layer/" in leaf or "/layers/" in leaf


def _build(config: Any) -> tuple[Any, dict[str, Any]]:
    """The graph and the shapes of a config's model."""
    if config.model_type not in _FAMILIES:
        raise ValueError(f"model type {config.model_type!r} is not supported, only "
                         f"{list(_FAMILIES)}")  # fmt: skip
    graph, state = nnx.split(
        nnx.eval_shape(lambda: _FAMILIES[config.model_type](config, nnx.Rngs(0)))
    )
    return graph, nnx.to_pure_dict(state)


def _model(
    config: Any,
    graph: Any,
    params: trees.Params,
    source: Path | None = None,
    untouched: dict[str, Any] | None = None,
    renamed: dict[str, str] | None = None,
) -> Model:
    def method(name: str) -> Callable[..., Any]:
        def call(params: trees.Params, *args: Any, **options: Any) -> Any:
            model = nnx.merge(graph, params)
            return (getattr(model, name) if name else model)(*args, **options)

        return call

    names = ("hidden", "lower", "head", "generate", "prefix")
    return Model(
        config=config,
        params=params,
        apply=method(""),
        **{name: method(name) for name in names},
        source=source,
        untouched=untouched or {},
        renamed=renamed or {},
    )


def from_config(config: Any, key: jax.Array, dtype: Any = jnp.float32) -> Model:
    """A model with random weights: N(0, initializer_range), norms 1 and biases 0.

    Args:
      config: a transformers config.
      key: PRNG key.
      dtype: of the parameters.

    Example:
      >>> from transformers import OPTConfig
      >>> config = OPTConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, ffn_dim=16,
      ...     num_attention_heads=2, max_position_embeddings=16, word_embed_proj_dim=8)
      >>> model = from_config(config, jax.random.key(0))
      >>> tokens = jnp.ones((1, 4), jnp.int32)
      >>> model.apply(model.params, tokens, tokens).shape
      (1, 4, 9)
    """
    graph, shapes = _build(config)
    spread = getattr(config, "initializer_range", None) or config.init_std

    def draw(path: Any, like: Any) -> jax.Array:
        name = trees.leaf_name(path)
        if name.endswith(("/kernel", "/embedding")):
            own = jax.random.fold_in(key, np.uint32(trees.leaf_hash(name)))
            # Drawn flat: the same numbers, for a quarter of the compile time.
            drawn = jax.random.normal(own, (like.size,)).reshape(like.shape)
            return (spread * drawn).astype(dtype)
        offset = config.model_type == "gemma3_text"
        return jnp.full(like.shape, 0 if name.endswith("bias") or offset else 1, dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return _model(config, graph, params)


def folder_of(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: a local one, or that of a hub id, downloaded if it must be.

    Raises:
      FileNotFoundError: neither.
    """
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: expected a folder with config.json, or a hub id org/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    small = [f"*{suffix}" for suffix in SMALL_FILES]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=[*small, "model*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # an old one
            folder = Path(snapshot_download(str(path), allow_patterns=[*small, "pytorch_*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{path}: no such folder here, and the hub does not give it: {error}"
        ) from error
    return folder


def weight_files(folder: Path) -> tuple[Callable[[Path], TensorFile], list[Path]]:
    """How to open a folder's weights, and where: one file, or those of its index.

    Safetensors, or, where there are none, PyTorch's own files.

    Raises:
      FileNotFoundError: a file is missing.
    """
    kinds = {"model.safetensors": TensorFile, "pytorch_model.bin": torchfile.TorchFile}
    found = {}
    for name in kinds:
        index, found[name] = folder / f"{name}.index.json", [folder / name]
        if index.is_file():
            parts = json.loads(index.read_text())["weight_map"].values()
            found[name] = [folder / part for part in sorted(set(parts))]
    there = (name for name, paths in found.items() if any(path.is_file() for path in paths))
    name = next(there, "model.safetensors")
    if missing := [str(path) for path in found[name] if not path.is_file()]:
        raise FileNotFoundError(f"expected {', '.join(missing)}")
    return kinds[name], found[name]


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, TensorFile]]:
    """Open a folder's weights; give tensor name -> file."""
    kind, paths = weight_files(folder)
    with ExitStack() as stack:
        opened = [stack.enter_context(kind(path)) for path in paths]
        yield {name: file for file in opened for name in file.tensors}


def from_pretrained(
    path: str | os.PathLike[str], dtype: Any = jnp.float32, progress: bool = True
) -> Model:
    """Load a model from a Hugging Face folder or hub id (config.json, safetensors).

    One tensor is read at a time: the peak is one copy of the parameters and a little.
    Families: OPT, Llama, Qwen2, Qwen3, Gemma 3 (text), SmolLM3; BERT and RoBERTa encoders.

    Args:
      path: folder, or ``org/name`` on the hub.
      dtype: of the parameters: float32, bfloat16 or float16.
      progress: whether to show a bar.

    Raises:
      FileNotFoundError: folder or files are missing.
      ValueError: another model type, or a missing, surplus or misshapen tensor, by name.

    Example:
      >>> from hiso_jax import models
      >>> try:
      ...     models.from_pretrained("no/such/folder")
      ... except FileNotFoundError as error:
      ...     print(error)
      no/such/folder: expected a folder with config.json, or a hub id org/name
    """
    from transformers import AutoConfig  # a slow import, and only needed here

    folder = folder_of(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: expected a folder with config.json")
    config = AutoConfig.from_pretrained(folder)
    try:
        graph, shapes = _build(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    filled: dict[str, jax.Array] = {}
    with open_tensors(folder) as there:
        leaves = trees.named(shapes)
        plan = {n: _tensors(folder, n, config, there) for n in leaves}
        used = {tensor for own in plan.values() for tensor in own}
        surplus = there.keys() - used - {n for n in there if _UNUSED.search(n)}
        tables = ("word_embeddings.weight", *_TABLES)
        table = next((n for n in used if n.endswith(tables)), "lm_head.weight")
        bias = next((n for n in used if n in ("lm_head.bias", "cls.predictions.bias")), "")
        if getattr(config, "tie_word_embeddings", True):
            for name in surplus & {*_TIED, *(_TIED_BIASES if bias else ())}:
                _check_tied(folder, there, bias if name in _TIED_BIASES else table, name)
                surplus -= {name}
        if surplus:
            raise ValueError(f"{folder}: unknown tensors: {sorted(surplus)}")
        # Largest first: what is in memory twice is large only while there is little else.
        order = sorted(leaves, key=lambda leaf: -leaves[leaf].size)
        for leaf in tqdm(order, desc=f"loading {folder.name}", disable=None if progress else True):
            shape = leaves[leaf].shape[1:] if _stacked(leaf) else leaves[leaf].shape
            rows = (_read(folder, there, name, shape, is_turned(leaf)) for name in plan[leaf])
            if _stacked(leaf):
                array: np.ndarray = np.empty(leaves[leaf].shape, dtype)
                for place, row in zip(array, rows, strict=True):
                    place[...] = row
            else:
                array = next(rows).astype(dtype, copy=False)
            filled[leaf] = jax.block_until_ready(jax.device_put(array))
        kept = [n for n in sorted(there.keys() - used) if n not in (*_TIED, *_TIED_BIASES)]
        untouched = {
            n: there[n].read(n, 0, there[n].tensors[n].size).reshape(there[n].tensors[n].shape)
            for n in kept
        }
    wanted = {leaf: tensor_names(leaf, config.num_hidden_layers) for leaf in plan}
    pairs = (pair for leaf in plan for pair in zip(wanted[leaf], plan[leaf], strict=True))
    renamed = {name: own for name, own in pairs if name != own}
    return _model(config, graph, trees.merge(shapes, filled), folder, untouched, renamed)


def _tensors(folder: Path, leaf: str, config: Any, there: Container[str]) -> list[str]:
    names = tensor_names(leaf, config.num_hidden_layers)
    found = [find(name, there) for name in names]
    if missing := [name for name, own in zip(names, found, strict=True) if own is None]:
        raise ValueError(f"{folder}: tensors missing: {missing}")
    return [own for own in found if own is not None]


def _read(
    folder: Path, there: dict[str, TensorFile], name: str, shape: tuple[int, ...], turned: bool
) -> np.ndarray:
    """A tensor in the shape of a leaf, or ValueError."""
    tensor, wanted = there[name].tensors[name], shape[::-1] if turned else shape
    if tensor.shape != wanted:
        raise ValueError(f"{folder}: {name!r} has shape {tensor.shape}, expected {wanted}")
    x = there[name].read(name, 0, tensor.size).reshape(wanted)
    return x.T if turned else x


def _check_tied(folder: Path, there: dict[str, TensorFile], table: str, name: str) -> None:
    one, two = (there[n].read(n, 0, there[n].tensors[n].size) for n in (table, name))
    if one.tobytes() != two.tobytes():
        raise ValueError(f"{folder}: the config ties {name!r} to {table!r}, they differ")


def save_pretrained(
    model: Model, folder: str | os.PathLike[str], params: trees.Params | None = None
) -> None:
    """Write a folder that ``transformers`` and `from_pretrained` load back.

    Tokenizer and other small files of the folder that the model came from go with it.

    Args:
      model: gives the config and the tensors that were not used.
      folder: made if absent; its config.json and model.safetensors are replaced.
      params: what to write instead of ``model.params``, same structure.
    """
    folder = Path(folder)
    leaves = trees.named(model.params if params is None else params)
    tensors = {n: Tensor(x.dtype, x.shape) for n, x in model.untouched.items()}
    parts: dict[str, tuple[str, int]] = {}
    for leaf, array in leaves.items():
        shape = array.shape[1:] if _stacked(leaf) else array.shape
        for i, name in enumerate(tensor_names(leaf, model.config.num_hidden_layers)):
            own, name = shape[::-1] if is_turned(leaf) else shape, model.renamed.get(name, name)
            tensors[name], parts[name] = Tensor(np.dtype(array.dtype), own), (leaf, i)
    with files.whole(folder / "model.safetensors") as part:
        with TensorFile.create(part, tensors, {"format": "pt"}) as file:
            for name, x in model.untouched.items():
                file.write(name, 0, x.reshape(-1))
            for name, (leaf, i) in parts.items():
                x = np.asarray(leaves[leaf][i] if _stacked(leaf) else leaves[leaf])
                file.write(name, 0, (x.T if is_turned(leaf) else x).reshape(-1))
    config = json.loads(model.config.to_json_string())
    config["dtype"] = str(next(iter(leaves.values())).dtype)
    for small in model.source.iterdir() if model.source else ():
        # The index is that of the files the weights came in, not of the one they are in now.
        wanted = small.is_file() and small.suffix in SMALL_FILES
        if wanted and not small.name.endswith(".index.json"):
            if small.resolve().parent != folder.resolve():
                shutil.copy(small, folder / small.name)
    with files.whole(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
