"""Hugging Face checkpoints as pure JAX functions of plain parameter dicts."""

from hiso_jax.models.huggingface import Model, from_config, from_pretrained, save_pretrained
from hiso_jax.models.subsets import upper_rows

__all__ = ["Model", "from_config", "from_pretrained", "save_pretrained", "upper_rows"]
