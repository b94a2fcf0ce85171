"""Prompts with their completions rendered as columns: no Python object for any of them."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.render.pieces import END_OF_TEXT, PIECE
from pipelines.render.prompt_templates import INPUT_HEADER, PromptTemplate
from pipelines.render.templates import Template

# Any such character makes a text one that no template refuses as blank.
VISIBLE = "[!-~]"


def find_pairs(batch: pa.RecordBatch, template: Template) -> pa.BooleanArray:
    """Return which records of a batch `render_pairs` renders; the others need `template.render`."""
    if not isinstance(template, PromptTemplate):
        return pa.array(np.zeros(batch.num_rows, bool))
    found = pc.and_(batch["messages"].is_null(), batch["text"].is_null())
    for name in ("prompt", "completion"):
        visible = pc.fill_null(pc.match_substring_regex(batch[name], VISIBLE), False)
        found = pc.and_(found, visible)
    return found


def render_pairs(
    prompts: pa.StringArray, completions: pa.StringArray, template: PromptTemplate
) -> pa.ListArray:
    """Return the pieces that `template.render` gives for each pair, as a list<PIECE> column."""
    frame, number = template.frame, len(prompts)
    before = pa.scalar(frame.before)
    if frame.before_input is not None:
        has_input = pc.match_substring(prompts, INPUT_HEADER)
        before = pc.if_else(has_input, frame.before_input, frame.before)
    framed = pc.binary_join_element_wise(before, prompts, frame.behind, "")
    answers = pc.binary_join_element_wise(frame.lead, completions, "")
    texts = pa.concat_arrays([framed, answers, pa.nulls(1, pa.string())])
    # Of each row: the start token, the framed prompt, the answer, the end of text.
    rows = np.arange(number)[:, None]
    chosen = np.concatenate(
        [np.full((number, 1), 2 * number), rows, rows + number, np.full((number, 1), 2 * number)], 1
    )
    controls = [frame.start, None, None, END_OF_TEXT]
    trained = [False, template.train_on_prompt, True, True]
    first = 0 if frame.start else 1
    columns = [
        texts.take(pa.array(chosen[:, first:].ravel())),
        pa.array(controls[first:] * number, pa.string()),
        pa.array(np.tile(trained[first:], number)),
    ]
    pieces = pa.StructArray.from_arrays(columns, fields=list(PIECE))
    offsets = np.arange(number + 1, dtype=np.int32) * (4 - first)
    return pa.ListArray.from_arrays(pa.array(offsets), pieces)
