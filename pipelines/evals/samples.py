"""Completions of held-out prompts, beside what the data says: the part of a score one can read.

Which records are shown depends on their ids alone (smallest sha256), so runs on the same data show
the same prompts.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from pipelines.recipe import Recipe
from pipelines.records import Row, read_rows
from pipelines.render.encode import encode_prompt
from pipelines.render.pieces import END_OF_TEXT, Piece, content
from pipelines.render.templates import Template, Unrenderable, get_template
from pipelines.serve.generate import StopTexts, complete, cut_at_stop, stop_ids

# A file has no prompt of its own: its beginning is continued, from within a line, as in an editor.
HEAD_LINES = 20
MIN_LINE = 8

Sample = dict[str, Any]


class Prompt(NamedTuple):
    """A record's prompt as pieces and ids, what follows it in the data, and what ends it.

    `stop` is a control token; `stop_texts` end an answer too.
    """

    record: Row
    pieces: list[Piece]
    ids: list[int]
    reference: str
    stop: str
    stop_texts: tuple[str, ...] = ()


def choose_prompts(
    shards: Iterable[Path],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    context: int,
    folder: Path | None = None,
) -> list[Prompt]:
    """Return the prompts to complete, at most `evaluation.num_samples`, in order of sha256 of id.

    Only prompts that leave room for `max_new_tokens` in a context of that many tokens count. Where
    the split holds files besides pairs or dialogues, half of the samples continue a file. `folder`
    holds the tokenizer, which a template in Jinja needs.
    """
    settings = recipe.evaluation
    template = get_template(recipe.template, folder)
    room = context - settings.max_new_tokens
    shards = list(shards)
    questions, files = (
        heapq.nsmallest(
            settings.num_samples,
            (
                prompt
                for prompt in _prompts(shards, template, tokenizer, is_code=is_code)
                if 0 < len(prompt.ids) <= room
            ),
            key=_rank,
        )
        for is_code in (False, True)
    )
    half = min(len(files), settings.num_samples // 2)
    chosen = questions[: settings.num_samples - half]
    return chosen + files[: settings.num_samples - len(chosen)]


def complete_prompts(
    model: Any, tokenizer: Tokenizer, prompts: Iterable[Prompt], *, max_new_tokens: int
) -> list[Sample]:
    """Return greedy completions as rows of samples.jsonl; control tokens are shown by name."""
    samples = []
    for prompt in prompts:
        stop = stop_ids(model, tokenizer, prompt.stop)
        completion = complete(
            model,
            prompt.ids,
            stop=stop,
            max_new_tokens=max_new_tokens,
            stop_texts=StopTexts(tokenizer, prompt.stop_texts),
        )
        text = tokenizer.decode(completion.ids, skip_special_tokens=False)
        samples.append(
            {
                "record_id": prompt.record["id"],
                "url": prompt.record["url"],
                "license": prompt.record["license"],
                "prompt": "".join(piece.text or piece.control or "" for piece in prompt.pieces),
                "reference": prompt.reference,
                "completion": cut_at_stop(text, prompt.stop_texts),
                "stopped": completion.stopped,
            }
        )
    return samples


def _prompts(
    shards: Iterable[Path], template: Template, tokenizer: Tokenizer, *, is_code: bool
) -> Iterator[Prompt]:
    for path in shards:
        for record in read_rows(path):
            if (record["text"] is not None) != is_code:
                continue
            found = _head(record) if is_code else _question(record, template)
            if found is not None:
                pieces, reference = found
                ids = encode_prompt(tokenizer, pieces)
                stops = (END_OF_TEXT, ()) if is_code else (template.stop, template.stop_texts)
                yield Prompt(record, pieces, ids, reference, *stops)


def _question(record: Row, template: Template) -> tuple[list[Piece], str] | None:
    """Return the prompt of a pair or dialogue and its last answer; None where it has none."""
    messages = record["messages"] or [{"role": "assistant", "content": record["completion"]}]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        return None
    try:
        return template.render_prompt(record), messages[-1]["content"]
    except Unrenderable:
        return None


def _head(record: Row) -> tuple[list[Piece], str] | None:
    """Return a file up to the middle of a line, and the rest of it; None for a short file."""
    text = record["text"]
    start = 0
    for number, line in enumerate(text.split("\n")):
        if number >= HEAD_LINES and len(line.strip()) >= MIN_LINE:
            cut = start + len(line) - len(line.strip()) // 2
            return content(text[:cut], trained=False), text[cut:]
        start += len(line) + 1
    return None


def _rank(prompt: Prompt) -> str:
    return hashlib.sha256(prompt.record["id"].encode()).hexdigest()
