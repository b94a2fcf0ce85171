"""Documents of any shape and cut give the rows that they hold; junk is counted, never a crash."""

import io
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import SourceError
from pipelines.sources.dataset import json_values, units
from pipelines.sources.dataset.bodies import BadRow, Rules, read_bodies
from pipelines.sources.dataset.json_values import drop_trailing_commas, read_document
from pipelines.sources.dataset.schemas import Schema, detect
from pipelines.sources.dataset.units import plan_units, read_unit

TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from('"\\[]{},: \n\u2028'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)


def rows_of(text, chunk):
    json_values.CHUNK, kept = chunk, json_values.CHUNK
    try:
        return list(read_document(io.BytesIO(text.encode("utf-8", "surrogatepass")), "x.json"))
    finally:
        json_values.CHUNK = kept


@given(
    st.lists(OBJECTS, max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 200),
)
def test_an_array_yields_its_elements_however_it_is_cut(rows, indent, plain, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=plain)

    items = rows_of(text, chunk)

    assert [json.loads(item.text) for item in items] == rows


@given(st.lists(OBJECTS, min_size=1, max_size=4), TEXT, VALUES, st.integers(1, 200))
def test_rows_are_found_below_a_key_whatever_stands_before_them(rows, key, value, chunk):
    text = json.dumps({f"~{key}": 3.25, "about": {"n": 1}, "data": rows, "end": "x"})

    items = rows_of(text, 4096 if chunk < 100 else 1 << 20)

    assert [json.loads(item.text) for item in items] == rows


@given(OBJECTS)
def test_dropping_trailing_commas_leaves_valid_json_alone(row):
    text = json.dumps(row)

    assert json.loads(drop_trailing_commas(text)) == row
    assert json.loads(drop_trailing_commas(text[:-1] + (",}" if row else "}"))) == row


@given(st.text(string.printable, max_size=60), st.integers(1, 20))
def test_a_document_of_anything_ends_in_rows_or_one_source_error(text, chunk):
    try:
        items = rows_of(text, chunk)
    except SourceError as error:
        items, said = [], str(error)
    else:
        said = "x.json: not valid JSON at line "

    assert said.startswith("x.json: not valid JSON at line ")
    assert all(item.text or item.reason for item in items)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30), max_size=12), st.integers(1, 60))
def test_every_line_lies_in_exactly_one_range(tmp_path_factory, found, size):
    content = b"\n".join(found)
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(content)
    [whole] = plan_units(path, "lines")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "RANGE_BYTES", size)
        cut = plan_units(path, "lines")

    parts = [line for unit in cut for line in units._lines(unit)]
    assert parts == list(units._lines(whole))
    assert b"".join(parts) == content
    assert all(row.reason or row.row is not None for row in read_unit(whole))


@given(OBJECTS, st.sampled_from(["messages", "pair", "text", "instances", "answers"]))
def test_a_row_of_anything_becomes_a_body_or_a_counted_reason(row, shape):
    names = ("messages", "prompt", "input", "completion", "text", "instances", "answers", "system")
    values = list(row.values())
    filled = {name: values[n % len(values)] for n, name in enumerate(names)} if values else {}

    try:
        bodies = list(read_bodies(filled, Schema(shape, {n: n for n in names}), Rules("\n")))
    except BadRow as error:
        bodies = [error.reason]

    assert all(bodies)
    assert bodies


@given(st.lists(OBJECTS, min_size=1, max_size=5))
def test_columns_of_anything_are_a_schema_or_one_source_error(rows):
    try:
        schema = detect(rows, {}, "source 'x': y.jsonl")
    except SourceError as error:
        said = str(error)
    else:
        said = f"source 'x': y.jsonl: {schema.columns}"

    assert said.startswith("source 'x': y.jsonl: ")
