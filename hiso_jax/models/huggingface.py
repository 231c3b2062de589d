"""Hugging Face folders in and out: every tensor used once, every leaf filled, or an error."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from hiso_jax import files, trees
from hiso_jax.models import bert

_FAMILIES = {"bert": bert}


class Model(NamedTuple):
    """A pretrained model as data and a pure function.

    Attributes:
      config: the transformers config.
      params: nested dict of arrays; layers are stacked along the first axis.
      apply: ``(params, input_ids [B, T], attention_mask [B, T]) -> hidden states [B, T, D]``.
      untouched: tensors of the checkpoint that `apply` does not use, by their own names.
    """

    config: Any
    params: trees.Params
    apply: Callable[..., jax.Array]
    untouched: dict[str, np.ndarray]


def tensor_names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that a leaf is made of: one, or one a layer.

    Example:
      >>> tensor_names("pooler/dense/kernel", 2), tensor_names("a/layer/norm/bias", 2)
      (['pooler.dense.weight'], ['a.layer.0.norm.bias', 'a.layer.1.norm.bias'])
    """
    *module, last = leaf.split("/")
    name = ".".join([*module, last if last == "bias" else "weight"])
    if not _stacked(leaf):
        return [name]
    return [name.replace(".layer.", f".layer.{i}.") for i in range(layers)]


def is_turned(leaf: str) -> bool:
    """Whether Hugging Face has it transposed: dense kernels are [out, in] there."""
    return leaf.endswith("/kernel")


def _stacked(leaf: str) -> bool:
    return "/layer/" in leaf


def from_pretrained(path: str | os.PathLike[str]) -> Model:
    """Load a model from a Hugging Face folder (config.json and model.safetensors).

    Weights are float32. Supported so far: BERT encoders.

    Raises:
      FileNotFoundError: the folder or one of the two files is missing.
      ValueError: another model type, or a missing, surplus or misshapen tensor, by name.

    Example:
      >>> from hiso_jax import models
      >>> try:
      ...     models.from_pretrained("no/such/folder")
      ... except FileNotFoundError as error:
      ...     print(error)
      no/such/folder: expected a folder with config.json and model.safetensors
    """
    from transformers import AutoConfig  # a slow import, and only needed here

    folder = Path(path)
    weights = folder / "model.safetensors"
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a folder with config.json and model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in _FAMILIES:
        raise ValueError(
            f"{path}: model type {config.model_type!r} is not supported, only {list(_FAMILIES)}"
        )
    family = _FAMILIES[config.model_type]
    graph, state = nnx.split(nnx.eval_shape(lambda: family.Bert(config, nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    filled: dict[str, jax.Array] = {}
    with safe_open(weights, "np") as tensors:
        surplus = set(tensors.keys())
        for leaf, wanted in trees.named(shapes).items():
            names = tensor_names(leaf, config.num_hidden_layers)
            if missing := [name for name in names if name not in surplus]:
                raise ValueError(f"{weights}: tensors missing: {missing}")
            surplus -= set(names)
            arrays = [tensors.get_tensor(name) for name in names]
            arrays = [array.T for array in arrays] if is_turned(leaf) else arrays
            array = np.stack(arrays) if _stacked(leaf) else arrays[0]
            if array.shape != wanted.shape:
                raise ValueError(
                    f"{weights}: {names[0]!r} makes {leaf!r} of shape {array.shape}, expected "
                    f"{wanted.shape}"
                )
            filled[leaf] = jnp.asarray(array, jnp.float32)
        ignored = {name for name in surplus if name.startswith(family.IGNORED)}
        if surplus - ignored:
            raise ValueError(f"{weights}: unknown tensors: {sorted(surplus - ignored)}")
        untouched = {name: tensors.get_tensor(name) for name in sorted(ignored)}

    def apply(params: trees.Params, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        return nnx.merge(graph, params)(input_ids, attention_mask)

    return Model(config, trees.merge(shapes, filled), apply, untouched)


def save_pretrained(
    model: Model, folder: str | os.PathLike[str], params: trees.Params | None = None
) -> None:
    """Write a folder that ``transformers`` and `from_pretrained` load back.

    Args:
      model: gives the config and the tensors that were not used.
      folder: made if absent; config.json and model.safetensors in it are replaced.
      params: what to write instead of ``model.params``, same structure.
    """
    tensors = dict(model.untouched)
    for leaf, array in trees.named(model.params if params is None else params).items():
        names = tensor_names(leaf, model.config.num_hidden_layers)
        parts = list(np.asarray(array)) if _stacked(leaf) else [np.asarray(array)]
        for name, part in zip(names, parts, strict=True):
            tensors[name] = np.ascontiguousarray(part.T if is_turned(leaf) else part)
    with files.whole(Path(folder) / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with files.whole(Path(folder) / "config.json") as part:
        part.write_text(model.config.to_json_string())
