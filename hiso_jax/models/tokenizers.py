"""The tokenizer of a model's folder, or one line that says why there is none."""

import os
from pathlib import Path
from typing import Any

from hiso_jax._engine.tensorfile import stand_in
from hiso_jax.models import folders

_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
          "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json")  # fmt: skip
_WANTED = "tokenizer.json (or vocab.json and merges.txt, vocab.txt, tokenizer.model)"


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Load the tokenizer of a model's folder, or of a GGUF file, with transformers.

    Args:
      folder: a local one, `Model.source`.

    Returns:
      A transformers tokenizer, with more in its vocabulary than special tokens.

    Raises:
      ValueError: there is none, or it does not load: the folder, what is there, what to do.

    Example:
      >>> import pathlib, tempfile
      >>> try:
      ...     load_tokenizer("no/such/folder")
      ... except ValueError as error:
      ...     print(error)
      no/such/folder: expected a folder with a tokenizer, there is no such folder
    """
    from transformers import AutoTokenizer  # a slow import, and only needed here

    folder = Path(folder)
    if file := folders.gguf_of(folder):
        from hiso_jax.models.gguftokenizer import tokenizer_of

        return tokenizer_of(file)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder with a tokenizer, there is no such folder")
    found = [name for name in _FILES if (folder / name).is_file()]
    for name in found:
        with open(folder / name, "rb") as file:
            begin = file.read(64)
        # Lists of words may be empty where another file has them.
        if (begin or name.endswith(".json")) and (what := stand_in(begin)):
            raise ValueError(f"{folder / name}: {what}")
    copy = f"copy {_WANTED} from where the model came from"
    if "vocab.json" in found and not {"tokenizer.json", "merges.txt"} & set(found):
        raise ValueError(f"{folder}: a tokenizer with vocab.json, but without merges.txt; {copy}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except Exception as error:  # what broken files raise is of any type, even plain Exception
        if "tokenizer.model" in found and "tokenizer.json" not in found:
            copy += "; tokenizer.model alone needs the packages sentencepiece and protobuf"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        what = ", ".join(found) or "it, it has no files of one"
        raise ValueError(
            f"{folder}: no tokenizer loads from {what}; {copy} ({reason:.200})"
        ) from error
    if not words:
        # Some classes make a tokenizer of nothing, which reads every text as unknown.
        raise ValueError(
            f"{folder}: the tokenizer has no words, only special tokens (found "
            f"{', '.join(found) or 'no files of one'}); {copy}"
        )
    return tokenizer
