"""Whatever a scraped field or a model writes, the page around it stays what it was."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from pipelines.markdown import cell, fence, table

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
NASTY = st.text(st.sampled_from("`~|<>\\[]()*_#!&-=+.:/ \n\t\r\0\x1b\u2028ab1"), max_size=60)
TEXT = st.one_of(st.text(max_size=60), NASTY)


def tokens(text):
    return [token.type for token in PARSER.parse(text)]


@given(TEXT, TEXT)
def test_a_fenced_text_is_one_code_block_and_what_follows_is_a_heading(text, after):
    page = f"before\n\n{fence(text, 'python')}\n\n# {cell(after) or 'after'}"

    parsed = [token for token in PARSER.parse(page) if token.type in ("fence", "heading_open")]

    assert [token.type for token in parsed] == ["fence", "heading_open"]
    assert parsed[0].content == UNSAFE.sub("\ufffd", text) + "\n"


@given(st.lists(st.lists(TEXT, min_size=3, max_size=3), max_size=4))
def test_a_table_has_its_rows_and_columns_and_no_html_whatever_the_cells_hold(rows):
    types = tokens(table(["a", "b", "c"], rows))

    assert types.count("table_open") == 1
    assert types.count("tr_open") == 1 + len(rows)
    assert types.count("th_open") == 3
    assert types.count("td_open") == 3 * len(rows)
    assert types[-1] == "table_close"


@given(TEXT)
def test_a_cell_holds_neither_tags_nor_links_nor_images_nor_code(text):
    inline = PARSER.parse(table(["a"], [[text]]))
    children = {c.type for token in inline for c in token.children or ()}

    assert not children & {"html_inline", "link_open", "image", "code_inline"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234567, "1,234,567"), (-5, "-5"), (0.25, "0.250"), (True, "True"), ("a | b", "a \\| b")],
)
def test_numbers_are_grouped_and_bars_are_escaped(value, shown):
    assert cell(value) == shown


def test_a_table_reads_well_as_plain_text_too():
    assert table(["name", "rows"], [["train", 1200], ["test", 7]]) == (
        "| name  |  rows |\n| ----- | ----: |\n| train | 1,200 |\n| test  |     7 |"
    )
