"""Preference pairs: two answers to one prompt, rendered as the recipe's template renders one.

A record whose `meta.rejected` holds a worse answer in `text` is a pair; it may be a list of such,
each with the number of the message (`turn`) that it is worse than, the last by default. Sources
with `pairs: true` write it: Stack Exchange from scores, OpenAssistant from ranks.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from pipelines.records import Row
from pipelines.render.encode import encode_pieces, encode_prompt
from pipelines.render.templates import Template, Unrenderable


class Pair(NamedTuple):
    """Token ids: the prompt, and what follows it in the better and in the worse answer."""

    record_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pairs(
    tokenizer: Tokenizer,
    template: Template,
    rows: Sequence[Row],
    block_size: int,
    clean: Callable[[str], str] = str,
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of rows, and how many rows or pairs are left out, by reason.

    `clean` is applied to the worse answers, which no stage of curation sees. A pair of which either
    text is longer than `block_size` is dropped, never cut: a cut answer has lost its end. Raises
    TemplateError as encode_pieces.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter(no_pair=0, too_long=0)
    for row in rows:
        before = len(pairs), dropped.total()
        for better, worse in read_rejected(row, clean):
            pair = _encode_pair(tokenizer, template, better, worse)
            if isinstance(pair, str):
                dropped[pair] += 1
            elif len(pair.prompt_ids) + _longer(pair) > block_size:
                dropped["too_long"] += 1
            else:
                pairs.append(pair)
        if (len(pairs), dropped.total()) == before:
            dropped["no_pair"] += 1
    return pairs, dict(dropped)


def read_rejected(row: Row, clean: Callable[[str], str]) -> Iterator[tuple[Row, str]]:
    """Yield the row up to an answer, and a worse one that differs from it."""
    meta: dict[str, Any] = json.loads(row["meta"] or "{}")
    found = meta.get("rejected") or []
    for each in found if isinstance(found, list) else [found]:
        better, text = row, each.get("text")
        if row["messages"] is not None and each.get("turn") is not None:
            better = {**row, "messages": row["messages"][: each["turn"] + 1]}
        if isinstance(text, str) and (worse := clean(text)).strip() and worse != _answer(better):
            yield better, worse


def _encode_pair(tokenizer: Tokenizer, template: Template, better: Row, worse: str) -> "Pair | str":
    """Return a pair, or the reason why it is none."""
    try:
        prompt = encode_prompt(tokenizer, template.render_prompt(_prompt(better)))
        texts = [
            encode_pieces(tokenizer, template.render(each)).input_ids
            for each in (better, _with_answer(better, worse))
        ]
    except Unrenderable as error:
        return error.why
    if any(text[: len(prompt)] != prompt for text in texts):
        return "other_prompt"  # a Jinja template that writes an answered question otherwise
    chosen, rejected = (text[len(prompt) :] for text in texts)
    return Pair(better["id"], prompt, chosen, rejected)


def _longer(pair: Pair) -> int:
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def _answer(row: Row) -> Any:
    return row["completion"] if row["messages"] is None else row["messages"][-1]["content"]


def _prompt(row: Row) -> Row:
    if row["messages"] is None:
        return {**row, "completion": None}
    return {**row, "messages": row["messages"][:-1]}


def _with_answer(row: Row, answer: str) -> Row:
    if row["messages"] is None:
        return {**row, "completion": answer}
    *before, last = row["messages"]
    return {**row, "messages": [*before, {**last, "content": answer}]}
