"""Prompts to arrays. Padding is on the left, so that every answer ends in the last column."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hiso_jax.tasks.data import Rows
from hiso_jax.tasks.prompts import Task

Arrays = dict[str, np.ndarray]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text with a token that no answer could follow.
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids


def _prompt(task: Task, row: Mapping[str, Any]) -> str:
    """The prompt of a row, which ends as all of the task do.

    White space at the end of a last column would take the place of the answer's gap, and words
    without one are other tokens.
    """
    whole = task.read(row)
    return whole.rstrip() if task.ends_in_column else whole


def _pair(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of the answer that follows, split where they part."""
    gap = "" if not prompt or prompt[-1].isspace() else " "
    before = _ids(tokenizer, prompt)
    if not answer:  # a gap without a word behind it is no answer
        return before, []
    whole = _ids(tokenizer, prompt + gap + answer)
    same = 0
    while same < min(len(before), len(whole) - 1) and before[same] == whole[same]:
        same += 1
    return whole[:same], whole[same:]


def _fit(ids: list[int], room: int, first: int | None) -> list[int]:
    """Cut a prompt at its beginning; the token that begins every text stays."""
    if len(ids) <= room:
        return ids
    keep = [ids[0]] if first is not None and ids[0] == first else []
    return keep + ids[len(ids) - room + len(keep) :]


def pad(rows: Sequence[Sequence[int]], length: int, token: int, left: bool = True) -> Arrays:
    """Pad rows of tokens: int32 ``input_ids`` and ``attention_mask`` [N, length]."""
    ids = np.full((len(rows), length), token, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        span = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, span], mask[i, span] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _padding(tokenizer: Any) -> int:
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)


def word_tokens(task: Task, tokenizer: Any) -> tuple[list[int], np.ndarray]:
    """Tokens by which the label words differ after a prompt, whatever is in its columns.

    Returns:
      Tokens that all words begin with (most often none), and the next one of each, int32 [labels].

    Raises:
      ValueError: a word is the beginning of another, so they cannot be told apart, or is empty.
    """
    if not all(word.strip() for word in task.verbalizer or ()):
        raise ValueError(f"verbalizer: expected none to be empty, got {task.verbalizer}")
    prompt = task.read(dict.fromkeys(task.columns, "text"))  # so that all sites have the same
    tokens = [_pair(tokenizer, prompt, word)[1] for word in task.verbalizer or ()]
    shared = 0
    while all(len(own) > shared for own in tokens) and len({own[shared] for own in tokens}) == 1:
        shared += 1
    firsts = [own[shared] for own in tokens if len(own) > shared]
    if len(set(firsts)) != len(tokens):
        raise ValueError(
            f"verbalizer: {task.verbalizer!r:.200} are not told apart by one token of this "
            f"tokenizer, they are {tokens!r:.200}; choose others with --verbalizer"
        )
    return tokens[0][:shared], np.array(firsts, np.int32)


def words(
    task: Task, tokenizer: Any, rows: Rows, length: int, shared: Sequence[int] = ()
) -> Arrays:
    """Prompts to classify by their label words: ``input_ids``, ``attention_mask``, ``label``.

    The answer is the token that follows the last column; see `word_tokens`.

    Args:
      task: with words.
      tokenizer: a transformers tokenizer.
      rows: N.
      length: tokens a prompt is cut to, at its beginning.
      shared: tokens that all words begin with, which go to the prompt.
    """
    word = (task.verbalizer or ("",))[0]
    prompts = [
        _fit([*_pair(tokenizer, _prompt(task, row), word)[0], *shared], length, _first(tokenizer))
        for row in rows
    ]
    labels = np.array([task.label_of(row) for row in rows], np.int32)
    return pad(prompts, length, _padding(tokenizer)) | {"label": labels}


def masked(task: Task, tokenizer: Any, rows: Rows, length: int) -> Arrays:
    """Prompts for encoders with a head, ``... It was <mask>.``: the word is told by the mask.

    As `words`, padded on the right, and ``place`` [N], the number of the mask's column.
    """
    ends = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    cut: list[list[int]] = []
    for row in rows:
        whole = tokenizer(f"{task.read(row).rstrip()} {tokenizer.mask_token}.")["input_ids"]
        inner = [token for token in whole if token not in ends]
        kept = _fit(inner, length - 2, None)
        cut.append([tokenizer.cls_token_id, *kept, tokenizer.sep_token_id])
    # The last one: a text may hold the word itself.
    place = [len(row) - 1 - row[::-1].index(tokenizer.mask_token_id) for row in cut]
    labels = np.array([task.label_of(row) for row in rows], np.int32)
    return pad(cut, length, _padding(tokenizer), left=False) | {
        "label": labels, "place": np.array(place, np.int32)
    }  # fmt: skip


def prompts(task: Task, tokenizer: Any, rows: Rows, length: int) -> Arrays:
    """Prompts alone, to generate from: ``input_ids`` and ``attention_mask``, int32 [N, length]."""
    own = [
        _fit(
            _pair(tokenizer, _prompt(task, row), task.answers(row)[0])[0], length, _first(tokenizer)
        )
        for row in rows
    ]
    return pad(own, length, _padding(tokenizer))


def _first(tokenizer: Any) -> int | None:
    bos = tokenizer.bos_token_id
    return tokenizer.cls_token_id if bos is None else bos


def answers(task: Task, tokenizer: Any, rows: Rows, length: int, room: int) -> Arrays:
    """Prompts with their answers, the answer's end in the last column.

    ``target`` [N, length] is 1 for tokens of the answer, the token that ends it included;
    all of them are among the last `room` columns.

    Args:
      task: whose label column is the answer.
      tokenizer: a transformers tokenizer.
      rows: N.
      length: tokens of prompt and answer; the prompt is cut at its beginning.
      room: tokens an answer is cut to.
    """
    sequences, sizes = [], []
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        prompt, answer = _pair(tokenizer, _prompt(task, row), task.answers(row)[0])
        answer = (answer + stop)[:room]
        sequences.append(_fit(prompt, length - len(answer), _first(tokenizer)) + answer)
        sizes.append(len(answer))
    out = pad(sequences, length, _padding(tokenizer))
    target = np.arange(length)[None] >= length - np.array(sizes)[:, None]
    return out | {"target": target.astype(np.int32)}


def chunks(texts: Sequence[str], tokenizer: Any, length: int) -> Arrays:
    """Plain text in pieces of `length` tokens; every token but a piece's first is a ``target``.

    A rest shorter than two tokens has nothing to predict and is left out; there may be no piece.
    """
    pieces = []
    for text in texts:
        ids = _ids(tokenizer, text)
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    out = pad(pieces, length, _padding(tokenizer))
    first = length - np.array([len(piece) for piece in pieces], int)[:, None]
    return out | {"target": (np.arange(length)[None] > first).astype(np.int32)}


def trim(batch: Mapping[str, np.ndarray], smallest: int = 16) -> Arrays:
    """Cut columns that are padding in the whole batch, to one of a few lengths.

    Lengths are `smallest` times powers of two and their halves between (16, 24, 32, 48, ...),
    so that few programs are compiled and little padding is computed. Padding is on the left, or,
    where the batch has a ``place``, on the right.

    Args:
      batch: columns [..., N, length]; those of `attention_mask`'s last axis are cut.
      smallest: length that is never cut.
    """
    mask = batch["attention_mask"]
    length = mask.shape[-1]
    longest = int(mask.sum(-1).max())
    kept = smallest
    while kept < longest:
        kept = kept * 3 // 2 if kept & (kept - 1) == 0 else kept // 3 * 4
    kept = min(kept, length)
    cut = {"input_ids", "attention_mask", "target"}
    span = slice(0, kept) if "place" in batch else slice(length - kept, length)
    return {k: v[..., span] if k in cut else v for k, v in batch.items()}
