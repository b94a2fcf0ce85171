"""The fast way through a dump gives, row by row, what lxml gives; the odd row is told apart."""

import os
from pathlib import Path

import pytest

from pipelines.sources.stack_exchange.dump import find_extent, read_range
from pipelines.sources.stack_exchange.entities import REFERENCES
from pipelines.sources.stack_exchange.parsing import COLUMNS, parse_post, parse_posts
from pipelines.sources.stack_exchange.rows import BadRow, read_chunk, read_line, read_plain
from tests.assets.stack_exchange_dump import answer, question, row

PLAIN = question(1) + answer(2, 1)


def rows_of(chunk, names=("Id", "Body", "Title")):
    """Return [values or reason] of every row of a chunk, and whether all were read fast."""
    plain, odd = read_chunk(chunk, names)
    found = [
        (line, values)
        for line, *values in zip(
            plain.lines, *[plain.values[name].to_pylist() for name in names], strict=True
        )
    ]
    for line in odd:
        try:
            rows = read_line(line.content)
            found += [(line.number, [a.get(n) for n in names]) for a in rows]
        except BadRow as error:
            found.append((line.number, error.reason))
    return [values for _, values in sorted(found, key=lambda pair: pair[0])], not odd


def rows_by_lxml(chunk, names=("Id", "Body", "Title")):
    found = []
    for line in chunk.split(b"\n"):
        if line.strip():
            try:
                found += [[a.get(n) for n in names] for a in read_line(line)]
            except BadRow as error:
                found.append(error.reason)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "<p>a &lt; b &amp;&amp; c</p>\n\n<pre><code>\"x\" 'y'\r\n\tz</code></pre>",
        "日本語 café 😀 𠀀 \u2028 \x7f \x85",
        "",
        " ",
        "&",
        "&amp;lt;" * 40,
        "ends with a reference &",
        '/> <row Id="7" />',
    ],
)
def test_text_of_all_kinds_is_read_fast_and_as_lxml_reads_it(text):
    chunk = (PLAIN + question(3, Body=text, Title=text) + answer(4, 3, Body=text)).encode()

    found, fast = rows_of(chunk)

    assert fast
    assert found == rows_by_lxml(chunk)
    assert found[2] == ["3", text, text]


@pytest.mark.parametrize("reference", [*REFERENCES])
def test_every_reference_is_replaced_as_lxml_does_it(reference):
    chunk = b'<row Id="1" Body="a%sb%s" />\n' % (reference, reference)

    assert rows_of(chunk) == (rows_by_lxml(chunk), True)


ODD = {
    "unknown reference": (b'  <row Id="1" Body="&nbsp;" />\n', "malformed_xml"),
    "unknown reference in what nobody asked for": (b'<row Id="1" X="&a;" />\n', "malformed_xml"),
    "numeric reference": (b'  <row Id="1" Body="&#x1F600;" />\n', ["1", "😀", None]),
    "decimal reference": (b'  <row Id="1" Body="&#233;" />\n', ["1", "é", None]),
    "reference to a control character": (b'<row Id="1" Body="&#x1;" />\n', "malformed_xml"),
    "bare ampersand": (b'  <row Id="1" Body="a & b" />\n', "malformed_xml"),
    "ampersand at the end": (b'  <row Id="1" Body="a&" />\n', "malformed_xml"),
    "single quotes": (b"  <row Id='1' Body='b' />\n", ["1", "b", None]),
    "single quotes around a double one": (b"  <row Id='1' Body='\"' />\n", ["1", '"', None]),
    "spaces around the sign": (b'  <row Id = "1" />\n', ["1", None, None]),
    "end tag": (b'  <row Id="1"></row>\n', ["1", None, None]),
    "tab as indent": (b'\t<row Id="1" />\n', ["1", None, None]),
    "raw tab in a value": (b'  <row Id="1" Body="a\tb" />\n', ["1", "a b", None]),
    "raw line end in a value": (b'  <row Id="1" Body="a\nb" />\n', ["1", "a b", None]),
    "attribute twice": (b'  <row Id="1" Id="2" />\n', "malformed_xml"),
    "attribute twice apart": (b'  <row Id="1" Body="" Id="2" />\n', "malformed_xml"),
    "raw < in a value": (b'  <row Id="1" Body="<p>" />\n', "malformed_xml"),
    "no closing": (b'  <row Id="1" Body="b">\n', "malformed_xml"),
    "odd number of quotes": (b'  <row Id="1" Body="b />\n', "malformed_xml"),
    "control character": (b'  <row Id="1" Body="\x01" />\n', "control_character"),
    "NUL": (b'  <row Id="1" Body="\x00" />\n', "control_character"),
    "escape in what nobody asked for": (b'  <row Id="1" X="\x1b" />\n', "control_character"),
    "invalid UTF-8": (b'  <row Id="1" Body="\xff" />\n', "invalid_utf8"),
    "lone surrogate": (b'  <row Id="1" Body="\xed\xa0\x80" />\n', "invalid_utf8"),
    "U+FFFE": ('  <row Id="1" Body="\ufffe" />\n'.encode(), "invalid_utf8"),
    "another element": (b'  <post Id="1" />\n', "not_a_row"),
    "an element in another namespace": (b'  <row xmlns="a:b" Id="1" />\n', "not_a_row"),
    "text": (b"some text\n", "not_a_row"),
    "text after a row": (b'  <row Id="1" /> x\n', "not_a_row"),
    "element in a row": (b'  <row Id="1"><b /></row>\n', "not_a_row"),
    "entity of one's own": (b'  <row Id="1" Body="&lol;" />\n', "malformed_xml"),
    "very long name": (b'  <row Id="1" %s="" />\n' % (b"A" * 300), ["1", None, None]),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["first", "between", "last", "alone"])
def test_an_odd_line_goes_through_lxml_and_leaves_its_neighbours_alone(name, place):
    line, expected = ODD[name]
    before = b"" if place in ("first", "alone") else PLAIN.encode()
    after = b"" if place in ("last", "alone") else PLAIN.encode()
    neighbours = [["1", "<p>Question 1?</p>\n", "Title 1"], ["2", "<p>Answer 2.</p>\n", None]]

    found, _ = rows_of(before + line + after)

    if name == "text" and before:
        # A line that starts with no tag belongs to the row before it, and spoils it.
        assert found == [neighbours[0], "not_a_row", *(neighbours if after else [])]
        return
    assert found == [*(neighbours if before else []), expected, *(neighbours if after else [])]


def test_blank_lines_comments_and_a_missing_last_line_end_are_no_rows():
    chunk = (question(1) + "\r\n\n" + "<!-- x -->\n" + answer(2, 1)).encode().rstrip()

    found, _ = rows_of(chunk)

    assert [values[0] for values in found] == ["1", "2"]
    assert rows_of(b"") == ([], True)
    assert rows_of(b"\n") == ([], True)


def test_a_reference_cut_by_the_end_of_a_value_is_none():
    for left, right in (("a&am", "p;b"), ("&", "lt;"), ("&lt", ";"), ("&lt;", ";")):
        chunk = f'<row Id="1" Body="{left}" />\n<row Id="2" Body="{right}" />\n'.encode()

        assert rows_of(chunk)[0] == rows_by_lxml(chunk)


def test_two_rows_on_one_line_are_both_read():
    chunk = (PLAIN + question(3).strip() + answer(4, 3).strip() + "\n").encode()

    found, fast = rows_of(chunk)

    assert [values[0] for values in found] == ["1", "2", "3", "4"]
    assert not fast


def test_rows_of_any_layout_are_plain_as_long_as_values_are_quoted():
    for line in ('<row Id="1"/>\n', '  <row Id="1" />\n', '<row Id="1" />\r\n', "  <row Z='' />\n"):
        assert (read_plain(line.encode(), ("Id",)) is None) == ("'" in line)


def parsed_both_ways(chunk):
    """Return (posts read as columns, numbers of the rows they leave), and posts row by row."""
    plain, odd = read_chunk(chunk, tuple(COLUMNS.values()))
    assert not odd
    parsed = parse_posts(plain)
    slow, bad, dropped = [], [], []
    for number, line in enumerate(chunk.split(b"\n")[:-1]):
        try:
            post = parse_post(read_line(line)[0])
        except BadRow:
            bad.append(number)
            continue
        (dropped if isinstance(post, str) else slow).append(post)
    return (
        (parsed.batch.to_pylist(), parsed.odd.tolist(), sorted(parsed.dropped.elements())),
        (slow, bad, sorted(dropped)),
    )


DRIFT = [
    ("Score", "abc"), ("Score", ""), ("Score", "1.5"), ("Score", " 1"), ("Score", "+1"),
    ("Score", "0x1F"), ("Score", "-"), ("Score", "1-2"), ("Score", "٣"), ("Score", "2147483648"),
    ("Score", "-2147483648"), ("Score", "007"), ("Score", "-0"), ("Score", None),
    ("Score", "9" * 17), ("Score", "9" * 18), ("Score", "9" * 19), ("Id", "9" * 30), ("Id", None),
    ("Id", "1e3"), ("PostTypeId", None), ("PostTypeId", "x"), ("PostTypeId", "4"),
    ("PostTypeId", "99"), ("PostTypeId", ""), ("Body", None), ("Title", None), ("Title", ""),
    ("CreationDate", None), ("CreationDate", ""), ("CreationDate", "yesterday"),
    ("CreationDate", "2019-02-30T00:00:00.000"), ("CreationDate", "2019-13-01T00:00:00.000"),
    ("CreationDate", "2020-02-29T23:59:59.999"), ("CreationDate", "2019-02-29T00:00:00.000"),
    ("CreationDate", "2019-03-01T24:00:00.000"), ("CreationDate", "2019-03-01T10:60:00.000"),
    ("CreationDate", "2019-03-01T10:00:60.000"), ("CreationDate", "0000-01-01T00:00:00.000"),
    ("CreationDate", "2019-03-01T10:00:00"), ("CreationDate", "2019-03-01 10:00:00.123"),
    ("CreationDate", "2019-03-01T10:00:00.12"), ("CreationDate", "2019-03-01T10:00:00+01:0"),
    ("ClosedDate", "never"), ("OwnerUserId", "-1"), ("OwnerUserId", None), ("ParentId", "x"),
    ("AcceptedAnswerId", "&#49;"), ("AcceptedAnswerId", ""), ("Tags", None), ("Tags", ""),
    ("Tags", "<a>"), ("Tags", "|a|b|"), ("Tags", "|a|"), ("Tags", "<a><b><c>"), ("Tags", "a"),
    ("Tags", "<>"), ("Tags", "<c#><c++><.net>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), DRIFT)
def test_columns_and_single_rows_accept_the_same_values(name, value):
    chunk = (PLAIN + question(3, **{name: value}) + answer(4, 3, **{name: value})).encode()

    by_columns, by_rows = parsed_both_ways(chunk)

    assert by_columns == by_rows


@pytest.mark.parametrize("site", ["se_cardano_2021", "se_conlang_meta_2020"])
def test_every_row_of_a_real_dump_is_read_fast_and_as_lxml_reads_it(site):
    folder = os.environ.get("STARLOOM_REAL_DATA")
    if not folder:
        pytest.skip("STARLOOM_REAL_DATA is not set")
    path = Path(folder, site, "Posts.xml")
    extent = find_extent(path, "posts")
    [*chunks] = read_range(path, extent, extent.start, extent.end, tuple(COLUMNS.values()))

    for chunk in chunks:
        assert chunk.odd == []
        by_columns, by_rows = parsed_both_ways(chunk.content)
        assert by_columns == by_rows
        assert by_rows[1] == []
    assert sum(len(chunk.plain.lines) for chunk in chunks) == path.read_bytes().count(b"<row ")


def test_row_asset_writes_what_lxml_reads():
    assert read_line(row(Id=1, Body='<a b="c">\n').encode()) == [{"Id": "1", "Body": '<a b="c">\n'}]
