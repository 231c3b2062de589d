"""Hugging Face folders in and out: every tensor used once, every leaf filled, or an error."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hiso_jax._engine import exact, files, trees
from hiso_jax._engine.tensorfile import QUANTIZED, Tensor, TensorFile
from hiso_jax.models import bert, configs, decoder, filling, folders, names, tokenizers, vit
from hiso_jax.models.folders import SMALL_FILES as SMALL_FILES
from hiso_jax.models.folders import folder_of, open_tensors
from hiso_jax.models.folders import gguf_of as gguf_of
from hiso_jax.models.folders import read_config as read_config
from hiso_jax.models.folders import weight_files as weight_files
from hiso_jax.models.names import find, is_stacked, is_turned, tensor_names

_ENCODERS: dict[str, Any] = {"bert": bert.Bert, "roberta": bert.Bert, "vit": vit.ViT}
_FAMILIES: dict[str, Any] = _ENCODERS | dict.fromkeys(
    ("opt", "llama", "qwen2", "qwen3", "gemma3_text", "smollm3"), decoder.Decoder
)


class Model(NamedTuple):
    """A pretrained model as data and pure functions.

    Tokens that its tables have no rows for raise ValueError, and so do more of them than it has
    positions (`hiso_jax.models.positions`); inside jit only their number is known. So do layers
    that it lacks, `begin` without a `stream`, and a prefix with one. What the mask says is padding
    never matters.

    A ViT takes ``pixels [B, H, W, C]``, normalized as it was trained, in the place of tokens and
    mask; its `apply` gives logits [B, labels], its `head` those of hidden states [B, T, D].

    Attributes:
      config: the transformers config.
      params: nested dict of arrays; layers are stacked along the first axis.
      apply: ``(params, input_ids [B, T], attention_mask [B, T])`` -> logits [B, T, V], or, for
        encoders, hidden states [B, T, D].
      hidden: as `apply`, -> hidden states [B, T, D].
        ``stream`` and ``begin`` go on from what `lower` gave.
      lower: ``(params, input_ids, attention_mask, end) -> [B, T, D]``, the input of layer `end`;
        ``stream`` and ``begin`` as of `hidden`.
      head: ``(params, hidden [..., D], rows=None) -> logits [..., V or rows]``; of encoders only
        those that come with a masked-language-model head.
      generate: ``(params, input_ids, attention_mask, max_new_tokens, stop=(), pad=0,
        prefix=None) -> int32 [B, max_new_tokens]``, the most probable tokens; decoders only.
      prefix: ``(params, input_ids [n]) -> keys and values [L, n, ...]`` that `hidden` and
        `generate` can put before every row; decoders only.
      source: the folder or GGUF file it came from, or None.
      untouched: tensors of the checkpoint that are not used, by their own names.
      renamed: tensors that the checkpoint has by other names than `tensor_names` gives.
      raw: what the config.json of its folder says (of a GGUF file: would say), or None.
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
    raw: dict[str, Any] | None = None

    @property
    def has_head(self) -> bool:
        """Whether `head` gives logits: of decoders always, of encoders if they came with one."""
        encoder = self.config.model_type in _ENCODERS
        return not encoder or bool({"cls", "lm_head", "classifier"} & self.params.keys())


_DRAWN = ("/kernel", "/embedding", "/projection/weight", "/cls_token", "/position_embeddings")


def _supported(kind: Any) -> None:
    if kind not in _FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported, only {list(_FAMILIES)}")


def _dtype(dtype: Any) -> np.dtype:
    """A type that parameters can have, or ValueError."""
    known = ["float32", "bfloat16", "float16", *["float64"] * jax.config.read("jax_enable_x64")]
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise ValueError(f"dtype: expected one of {known}, got {dtype!r}")
    return found


def _build(config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The graph and the shapes of a config's model."""
    _supported(config.model_type)
    make = _FAMILIES[config.model_type]
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0), **options)))
    return graph, nnx.to_pure_dict(state)


def _model(
    config: Any,
    graph: Any,
    params: trees.Params,
    source: Path | None = None,
    untouched: dict[str, Any] | None = None,
    renamed: dict[str, str] | None = None,
    raw: dict[str, Any] | None = None,
) -> Model:
    def method(name: str) -> Callable[..., Any]:
        def call(params: trees.Params, *args: Any, **options: Any) -> Any:
            model = nnx.merge(graph, params)
            if name and not hasattr(model, name):
                raise ValueError(f"{name}: only decoders have it, not {config.model_type}")
            return (getattr(model, name) if name else model)(*args, **options)

        return call

    methods = ("hidden", "lower", "head", "generate", "prefix")
    return Model(
        config=config,
        params=params,
        apply=method(""),
        **{name: method(name) for name in methods},
        source=source,
        untouched=untouched or {},
        renamed=renamed or {},
        raw=raw,
    )


def from_config(config: Any, key: jax.Array, dtype: Any = jnp.float32) -> Model:
    """A model with random weights: N(0, initializer_range), norms 1 and biases 0.

    Args:
      config: a transformers config.
      key: PRNG key.
      dtype: of the parameters: float32, bfloat16 or float16; float64 with 64-bit types.

    Raises:
      ValueError: another dtype, or a config of something that is not supported, by name.

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
    dtype = _dtype(dtype)
    drawn = jnp.dtype(jnp.float32) if dtype == jnp.float64 else dtype
    spread = getattr(config, "initializer_range", None) or config.init_std

    def draw(path: Any, like: Any) -> jax.Array:
        name = trees.leaf_name(path)
        if name.endswith(_DRAWN):
            own = jax.random.fold_in(key, np.uint32(trees.leaf_hash(name)))
            return _normal(own, spread, like.shape, drawn)
        offset = config.model_type == "gemma3_text"
        return jnp.full(like.shape, 0 if name.endswith("bias") or offset else 1, drawn)

    with exact.usual_types():
        params = jax.tree_util.tree_map_with_path(draw, shapes)
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return _model(config, graph, params)


@partial(jax.jit, static_argnums=(2, 3))
def _normal(key: jax.Array, spread: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # Drawn flat: the same numbers, for a quarter of the compile time.
    drawn = jax.random.normal(key, (math.prod(shape),)).reshape(shape)
    # Apart, since a compiler takes two factors together, which rounds differently.
    return (spread * jax.lax.optimization_barrier(drawn)).astype(dtype)


def from_pretrained(
    path: str | os.PathLike[str], dtype: Any = jnp.float32, progress: bool = True
) -> Model:
    """Load a model from a Hugging Face folder or hub id (config.json, safetensors), or from GGUF.

    One tensor is read at a time: the peak is one copy of the parameters and a little.
    Families: OPT, Llama, Qwen2, Qwen3, Gemma 3 (text), SmolLM3; BERT and RoBERTa encoders; ViT.
    Of GGUF files: Llama, Qwen2, Qwen3, Gemma 3 (text), dequantized.

    Whether an encoder has a head is told by its tensors.

    Args:
      path: folder, or ``org/name`` on the hub, or a GGUF file, or a folder with one.
      dtype: of the parameters: float32, bfloat16 or float16.
      progress: whether to show a bar.

    Raises:
      FileNotFoundError: folder or files are missing.
      ValueError: another model type; files that are broken, quantized or adapters; a missing,
        surplus or misshapen tensor, by name. All of it before the first tensor is read.

    Example:
      >>> from hiso_jax import models
      >>> try:
      ...     models.from_pretrained("no/such/folder")
      ... except FileNotFoundError as error:
      ...     print(error)
      no/such/folder: expected a folder with config.json, a .gguf file, or a hub id org/name
    """
    dtype, folder = _dtype(dtype), folder_of(path)
    folder = gguf_of(folder) or folder
    raw = read_config(folder)
    with _of(folder):
        _supported(raw["model_type"])
    config = configs.load_config(folder)
    with open_tensors(folder) as there:
        kind = config.model_type
        own = {"headed": names.has_head(there, kind)} if kind in _ENCODERS else {}
        with _of(folder):
            graph, shapes = _build(config, **own)
            plan = _plan(config, shapes, there)
        filled = filling.fill(trees.named(shapes), plan, there, dtype, progress and folder.name)
        used = {tensor for own in plan.values() for tensor in own}
        copies = {*names.TIED, *names.TIED_BIASES}
        untouched = {n: filling.whole(there, n) for n in sorted(there.keys() - used - copies)}
    wanted = {leaf: tensor_names(leaf, config.num_hidden_layers) for leaf in plan}
    pairs = (pair for leaf in plan for pair in zip(wanted[leaf], plan[leaf], strict=True))
    renamed = {name: own for name, own in pairs if name != own}
    return _model(config, graph, trees.merge(shapes, filled), folder, untouched, renamed, raw)


def headless(model: Model) -> Model:
    """An encoder without its head: `apply` gives hidden states."""
    kept = {name: tree for name, tree in model.params.items() if name != "classifier"}
    graph, _ = _build(model.config, headed=False)
    return _model(model.config, graph, kept, model.source)


@contextmanager
def _of(folder: Path) -> Iterator[None]:
    """Put the folder's name before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _plan(
    config: Any, shapes: dict[str, Any], there: dict[str, TensorFile]
) -> dict[str, list[str]]:
    """The tensors that each leaf is made of, by name; ValueError if anything does not fit."""
    if coded := sorted(n for n in there if names.is_quantized(n)):
        raise ValueError(f"tensor {coded[0]!r} is of {QUANTIZED}")
    leaves, tied = trees.named(shapes), getattr(config, "tie_word_embeddings", True)
    wanted = {leaf: tensor_names(leaf, config.num_hidden_layers) for leaf in leaves}
    where = {name: find(name, there) for own in wanted.values() for name in own}
    # A head of its own is no stand-in for embeddings that are missing.
    missing = [name for name, own in where.items()
               if own is None or (own in names.TIED and own != name and not tied)]  # fmt: skip
    if missing:
        raise ValueError(names.missing(missing, there.keys()))
    plan = {leaf: [str(where[name]) for name in own] for leaf, own in wanted.items()}
    used = {name: leaf for leaf, own in plan.items() for name in own}
    surplus = there.keys() - used - {n for n in there if names.UNUSED.search(n)}
    if tied:
        table = next((n for n in used if n.endswith(names.TABLES)), "lm_head.weight")
        bias = next((n for n in used if n in names.BIASES), "")
        for name in surplus & {*names.TIED, *(names.TIED_BIASES if bias else ())}:
            filling.check_tied(there, bias if name in names.TIED_BIASES else table, name)
            surplus -= {name}
    if surplus:
        raise ValueError(names.unknown(surplus))
    for own, leaf in used.items():
        tensor, shape = there[own].tensors[own], leaves[leaf].shape[is_stacked(leaf) :]
        shape = shape[::-1] if is_turned(leaf) else shape
        if tensor.shape != shape:
            raise ValueError(f"{own!r} has shape {tensor.shape}, expected {shape} by the config")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{own!r} is of type {tensor.dtype} where weights are expected, as in "
                             f"{QUANTIZED}")  # fmt: skip
    return plan


def save_pretrained(
    model: Model, folder: str | os.PathLike[str], params: trees.Params | None = None
) -> None:
    """Write a folder that ``transformers`` and `from_pretrained` load back.

    Tokenizer and other small files of the folder that the model came from go with it, and what
    its config.json says, but for the dtype.

    Args:
      model: gives the config and the tensors that were not used.
      folder: made if absent; its config.json and model.safetensors are replaced, and the index
        and the files of older weights in several files are removed.
      params: what to write instead of ``model.params``, same structure.

    Raises:
      ValueError: `params` are not those of this model, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder to write into, found a file")
    leaves = trees.named(model.params if params is None else params)
    wanted, given = (
        {(n, x.shape) for n, x in own.items()} for own in (trees.named(model.params), leaves)
    )
    if wanted != given:
        raise ValueError(f"params: expected the leaves of the model, {sorted(wanted - given)[:2]} "
                         f"among them, got {sorted(given - wanted)[:2]}")  # fmt: skip
    config = configs.written(model.config, model.raw, str(next(iter(leaves.values())).dtype))
    tensors = {n: Tensor(x.dtype, x.shape) for n, x in model.untouched.items()}
    parts: dict[str, tuple[str, int]] = {}
    for leaf, array in leaves.items():
        shape = array.shape[1:] if is_stacked(leaf) else array.shape
        for i, name in enumerate(tensor_names(leaf, model.config.num_hidden_layers)):
            own, name = shape[::-1] if is_turned(leaf) else shape, model.renamed.get(name, name)
            tensors[name], parts[name] = Tensor(np.dtype(array.dtype), own), (leaf, i)
    with files.atomic_write(folder / "model.safetensors", sweeps=True) as part:
        with TensorFile.create(part, tensors, {"format": "pt"}) as file:
            for name, x in model.untouched.items():
                file.write(name, 0, x.reshape(-1))
            here: dict[str, np.ndarray] = {}
            for name, (leaf, i) in parts.items():
                if leaf not in here:  # one at a time, whose layers are views of it
                    here = {leaf: np.asarray(leaves[leaf])}
                x = here[leaf][i] if is_stacked(leaf) else here[leaf]
                file.write(name, 0, (x.T if is_turned(leaf) else x).reshape(-1))
    folders.remove_shards(folder)
    _save_config(config, folder)
    _copy_small(model.source, folder)


def save_small(file: Path, folder: Path, dtype: str) -> None:
    """Write what `save_pretrained` writes beside the weights of a model from a GGUF file.

    Args:
      file: the GGUF file.
      folder: made if absent.
      dtype: of the parameters.

    Raises:
      ValueError: the file does not say what model it is of.
    """
    raw = read_config(file)
    _save_config(configs.written(configs.load_config(file), raw, dtype), folder)
    _copy_small(file, folder)


def _save_config(config: dict[str, Any], folder: Path) -> None:
    with files.atomic_write(folder / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def _copy_small(source: Path | None, folder: Path) -> None:
    """Copy the small files of the folder a model came from, which may be gone by now.

    Of a GGUF file the tokenizer in it, as files of its own.
    """
    if source is None or source.resolve() == folder.resolve():
        return
    if source.is_file():
        try:
            tokenizers.load_tokenizer(source).save_pretrained(folder)
        except ValueError as error:  # hours of work must not end here
            warnings.warn(f"the tokenizer does not go with the weights: {error}", stacklevel=3)
        return
    if not source.is_dir():
        warnings.warn(f"{source} is gone: the tokenizer does not go with the weights to {folder}",
                      stacklevel=3)  # fmt: skip
        return
    for small in folders.small_files(source):
        # Written anew; or of the files the weights came in, not of the one they are in now.
        own = str(small) in ("config.json", "adapter_config.json")
        if not own and not small.name.endswith(".index.json"):
            (folder / small).parent.mkdir(exist_ok=True)
            with files.atomic_write(folder / small) as part:
                shutil.copyfile(source / small, part)  # without its mode, which some mounts refuse
