"""Configs of transformers in and out: what others wrote into a config.json stays in it."""

import copy
import json
from pathlib import Path
from typing import Any

from hiso_jax.models import folders

# Of the class or the place, and not of the model.
_OWN = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")


def load_config(folder: Path) -> Any:
    """The transformers config of a folder, or of a GGUF file.

    Raises:
      ValueError: transformers does not take it.
    """
    from transformers import AutoConfig  # a slow import, and only needed here

    file = folders.gguf_of(folder)
    try:
        if file is not None:
            return AutoConfig.for_model(**folders.read_config(file))
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # of many types: each field of a config has checks of its own
        reason = " ".join(str(error).split())
        path = file or folder / "config.json"
        raise ValueError(f"{path}: not a config: {reason:.300}") from error


def _plain(config: Any) -> dict[str, Any]:
    return {k: x for k, x in json.loads(config.to_json_string()).items() if k not in _OWN}


def written(config: Any, raw: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """What a model's config.json is to say.

    Args:
      config: the model's, maybe changed since it was loaded.
      raw: what the config.json that it came from says; None if it came from none.
      dtype: of the parameters.

    Returns:
      `raw` with the new dtype and with what was changed in `config`, in the spelling of whatever
      version wrote it; or the config, its rotary positions also as transformers 4 reads them.

    Example:
      >>> from transformers import LlamaConfig
      >>> out = written(LlamaConfig(rope_parameters={"rope_theta": 5e5}), None, "float32")
      >>> out["rope_theta"], out["rope_parameters"]["rope_theta"]
      (500000.0, 500000.0)
    """
    now = _plain(config)
    if raw is None:
        out = json.loads(config.to_json_string()) | _older(now.get("rope_parameters") or {})
    else:
        was = _plain(type(config).from_dict(copy.deepcopy(raw)))  # it writes into what it is given
        changed = {k: x for k, x in now.items() if k not in was or was[k] != x}
        out = {k: x for k, x in raw.items() if k not in was.keys() - now.keys()} | changed
        out |= _older(changed.get("rope_parameters") or {})
    return with_dtype(out, dtype)


def with_dtype(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """What a config.json says, with the dtype of the weights: readers convert to what it names.

    Example:
      >>> with_dtype({"torch_dtype": "float16", "vocab_size": 9}, "float32")
      {'torch_dtype': 'float32', 'vocab_size': 9, 'dtype': 'float32'}
    """
    return raw | ({"torch_dtype": dtype} if "torch_dtype" in raw else {}) | {"dtype": dtype}


def _older(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions by the names that transformers 4 knows, which passes over the new one."""
    if "full_attention" in rope and "sliding_attention" in rope:  # Gemma 3
        local = rope["sliding_attention"].get("rope_theta")
        return _older(rope["full_attention"]) | {"rope_local_base_freq": local}
    if "rope_theta" not in rope:
        return {}
    scaling = {k: x for k, x in rope.items() if k != "rope_theta"}
    plain = rope.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}
