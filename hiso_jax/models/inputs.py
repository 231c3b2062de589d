"""Tokens at the door of a model: shapes, ids and positions that its tables have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hiso_jax._engine import checks


def positions(config: Any) -> int | None:
    """Tokens a text may have: what a model's table of positions holds; None without a table.

    Args:
      config: a transformers config.

    Example:
      >>> from transformers import LlamaConfig, OPTConfig, RobertaConfig
      >>> positions(OPTConfig()), positions(RobertaConfig(max_position_embeddings=514))
      (2048, 512)
      >>> print(positions(LlamaConfig()))
      None
    """
    if config.model_type == "roberta":  # it begins after the place of its padding
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings if config.model_type in ("bert", "opt") else None


def _array(x: Any) -> Any:
    return x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)


def _is_known(*arrays: Any) -> bool:
    """Whether the values can be looked at: not inside jit, nor if other processes hold a part."""
    return checks.is_concrete(arrays) and all(
        getattr(x, "is_fully_addressable", True) for x in arrays
    )


def check(
    config: Any, input_ids: Any, attention_mask: Any, before: int = 0, after: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Return tokens int32 [B, T] and their mask [B, T] as arrays.

    Where the values are known, only tokens under a 1 of the mask count; inside jit, where they
    are not, ids pass and every column counts as a token.

    Args:
      config: a transformers config.
      input_ids: [B, T].
      attention_mask: [B, T], > 0 for a token.
      before: tokens before every row, of a prefix.
      after: tokens to come after every row.

    Raises:
      ValueError: another shape or type, an id that the vocabulary lacks, or more tokens than
        there are positions.
    """
    ids, mask = _array(input_ids), _array(attention_mask)
    if ids.ndim != 2:
        raise ValueError(
            f"input_ids: expected shape [B, T], rows of tokens, got {tuple(ids.shape)}"
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {tuple(ids.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"input_ids: expected integers, got {ids.dtype}")
    count, used = ids.shape[1], ids.shape[1]
    if ids.size and _is_known(ids, mask):
        valid = np.asarray(mask) > 0
        own = np.asarray(ids)[valid]
        if (wrong := own[(own < 0) | (own >= config.vocab_size)]).size:
            raise ValueError(
                f"input_ids: id {wrong[0]} is beyond the model's table of {config.vocab_size} rows "
                "(its vocab_size); is it the tokenizer of this model?"
            )
        # BERT counts columns, the others tokens.
        last = count - valid[:, ::-1].argmax(1) if config.model_type == "bert" else valid.sum(1)
        used = int((last * valid.any(1)).max())
    limit = positions(config)
    # Of the tokens to come, the last one is not read.
    if limit is not None and (wanted := before + used + max(after - 1, 0)) > limit:
        parts = [f"{used} tokens"] + [f"{before} of a prefix"] * (before > 0)
        parts += [f"{after} new ones"] * (after > 0)
        raise ValueError(
            f"input_ids: {', '.join(parts)} need {wanted} positions, the model's table holds "
            f"{limit}; cut the text (--length)"
        )
    return jnp.asarray(ids).astype(jnp.int32), jnp.asarray(mask)


def check_layers(
    config: Any, stream: Any, begin: int, end: int | None = None, prefix: Any = None
) -> None:
    """Raise unless layers `begin` to `end` of a model can be run.

    Args:
      config: a transformers config.
      stream: the input of layer `begin`; None: the model begins with its input.
      begin: in 0 to L, 0 without a stream.
      end: in `begin` to L; None: L.
      prefix: keys and values before every row, or None; not with a stream.

    Raises:
      ValueError: otherwise.
    """
    count = config.num_hidden_layers
    if not 0 <= begin <= (count if end is None else end) <= count:
        text = f"begin={begin}" if end is None else f"begin={begin} and end={end}"
        raise ValueError(f"{text}: expected 0 <= begin <= end <= {count}, the model's layers")
    if stream is None and begin:
        raise ValueError(f"begin: needs the stream that enters layer {begin}")
    if stream is not None and prefix is not None:
        raise ValueError("prefix: expected none with a stream")


def safe(input_ids: jax.Array, valid: jax.Array, rows: int) -> jax.Array:
    """Ids int32 [B, T] for a table of so many rows, in which padding is always there.

    A table gives NaN for a row it lacks, which would spread from a padding id (one more than the
    vocabulary has, or -100) to every token. A token that the table lacks is to give NaN, even one
    below 0, which would be counted from the end.
    """
    inside = (input_ids >= 0) & (input_ids < rows)
    return jnp.where(inside, input_ids, jnp.where(valid, rows, 0))
