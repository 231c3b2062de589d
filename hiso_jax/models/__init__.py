"""Hugging Face checkpoints as pure JAX functions of plain parameter dicts."""

from hiso_jax.models.folders import folder_of
from hiso_jax.models.huggingface import Model, from_config, from_pretrained, save_pretrained
from hiso_jax.models.inputs import positions
from hiso_jax.models.subsets import upper_rows
from hiso_jax.models.tokenizers import load_tokenizer

__all__ = [
    "Model",
    "folder_of",
    "from_config",
    "from_pretrained",
    "load_tokenizer",
    "positions",
    "save_pretrained",
    "upper_rows",
]
