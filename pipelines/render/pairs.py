"""Preference pairs: two answers to one prompt, rendered as the recipe's template renders one.

A record whose `meta.rejected.text` holds a worse answer is a pair: Stack Exchange makes such
records from scores where its source says `pairs: true`.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from pipelines.records import Row
from pipelines.render.encode import encode_pieces, encode_prompt
from pipelines.render.templates import Template


class Pair(NamedTuple):
    """Token ids: the prompt, and what follows it in the better and in the worse answer."""

    record_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pairs(
    tokenizer: Tokenizer, template: Template, rows: Sequence[Row], block_size: int
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of rows, and how many rows give none, by reason.

    A pair of which either text is longer than `block_size` is dropped, never cut: a cut answer has
    lost its end. Raises Unrenderable as the template does, TemplateError as encode_pieces.
    """
    pairs: list[Pair] = []
    dropped = {"no_pair": 0, "too_long": 0}
    for row in rows:
        worse = _rejected(row)
        if worse is None:
            dropped["no_pair"] += 1
            continue
        better, prompt = dict(row), encode_prompt(tokenizer, template.render_prompt(_prompt(row)))
        texts = [
            encode_pieces(tokenizer, template.render(each)).input_ids
            for each in (better, _with_answer(row, worse))
        ]
        assert all(text[: len(prompt)] == prompt for text in texts), "a prompt is a prefix"
        if max(map(len, texts)) > block_size:
            dropped["too_long"] += 1
            continue
        chosen, rejected = (text[len(prompt) :] for text in texts)
        pairs.append(Pair(row["id"], prompt, chosen, rejected))
    return pairs, dropped


def _rejected(row: Row) -> str | None:
    """Return the worse answer, where there is one that differs."""
    meta: dict[str, Any] = json.loads(row["meta"] or "{}")
    worse = (meta.get("rejected") or {}).get("text")
    better = row["completion"] if row["messages"] is None else row["messages"][-1]["content"]
    return worse if isinstance(worse, str) and worse.strip() and worse != better else None


def _prompt(row: Row) -> Row:
    if row["messages"] is None:
        return {**row, "completion": None}
    return {**row, "messages": row["messages"][:-1]}


def _with_answer(row: Row, answer: str) -> Row:
    if row["messages"] is None:
        return {**row, "completion": answer}
    *before, last = row["messages"]
    return {**row, "messages": [*before, {**last, "content": answer}]}
