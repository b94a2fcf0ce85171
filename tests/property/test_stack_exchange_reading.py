"""Whatever a dump holds, the fast way equals lxml, ranges share nothing, and counts add up."""

from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.engine import Job, Work
from pipelines.records import read_rows
from pipelines.settings.sources import StackExchangeSource
from pipelines.sources import stack_exchange
from pipelines.sources.stack_exchange import dump, imports
from pipelines.sources.stack_exchange.dump import find_extent, read_range
from pipelines.sources.stack_exchange.parsing import COLUMNS, parse_post, parse_posts
from pipelines.sources.stack_exchange.partitions import partition_of, read_partition
from pipelines.sources.stack_exchange.rows import (
    BadRow,
    pick_lines,
    read_chunk,
    read_line,
    split_lines,
)
from tests.assets.stack_exchange_dump import answer, dump_source, posts_xml, question, row

NAMES = tuple(COLUMNS.values())
# What XML can hold in an attribute, and often what means something to a parser.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("<>&\"' \n\r\t/=;#xA\x85\u2028"),
        st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff"),
    ),
    max_size=40,
)
VALUES = st.one_of(TEXTS, st.integers().map(str), st.none())
ROWS = st.one_of(
    st.builds(row, **dict.fromkeys(("Id", "PostTypeId", "Body", "Title"), VALUES)),
    st.builds(question, st.integers(1, 9), Body=TEXTS, Title=TEXTS, Tags=TEXTS),
    st.builds(answer, st.integers(1, 9), st.integers(1, 9), Body=TEXTS, Score=VALUES),
)
CHUNKS = st.lists(ROWS, max_size=8).map(lambda rows: "".join(rows).encode())
# Single bytes changed, dropped or put in: what disks, editors and mirrors do to a file.
EDITS = st.lists(
    st.tuples(
        st.integers(0, 10_000), st.sampled_from(["set", "cut", "add"]), st.binary(max_size=3)
    ),
    max_size=3,
)


def edit(chunk, edits):
    content = bytearray(chunk)
    for place, how, new in edits:
        at = place % (len(content) + 1)
        content[at : at + (0 if how == "add" else max(1, len(new)))] = b"" if how == "cut" else new
    return bytes(content)


def read_both_ways(chunk):
    """Return [post, reason it is dropped for, or why it is bad] of all rows, fast and slow."""
    plain, odd = read_chunk(chunk, NAMES)
    parsed = parse_posts(plain)
    left = [*odd, *pick_lines(chunk, plain.lines[parsed.odd])]
    fast = [*parsed.batch.to_pylist(), *parsed.dropped.elements(), *read_slowly(left)]
    slow = read_slowly(split_lines(chunk))
    return sorted(map(repr, fast)), sorted(map(repr, slow))


def read_slowly(lines):
    found = []
    for line in lines:
        try:
            rows = read_line(line.content)
        except BadRow as error:
            found.append(error.reason)
            continue
        for attributes in rows:
            try:
                found.append(parse_post(attributes))
            except BadRow as error:
                found.append(error.reason)
    return found


@settings(max_examples=300, deadline=None)
@given(CHUNKS)
def test_the_fast_way_reads_what_lxml_reads(chunk):
    fast, slow = read_both_ways(chunk)

    assert fast == slow


@settings(max_examples=500, deadline=None)
@given(CHUNKS, EDITS)
def test_the_fast_way_reads_what_lxml_reads_in_damaged_files(chunk, edits):
    fast, slow = read_both_ways(edit(chunk, edits))

    assert fast == slow


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROWS, max_size=12),
    st.integers(1, 4000),
    st.integers(1, 3000),
    st.sampled_from(["", "\n", "\r\n\r\n"]),
)
def test_ranges_of_any_size_hold_every_row_once(rows, range_bytes, chunk_bytes, blank):
    with TemporaryDirectory() as folder, patch.object(dump, "CHUNK_BYTES", chunk_bytes):
        path = Path(folder, "Posts.xml")
        path.write_bytes(posts_xml(*[line + blank for line in rows]))
        extent = find_extent(path, "posts")
        found = b""
        for first in range(extent.start, max(extent.end, extent.start + 1), range_bytes):
            for chunk in read_range(path, extent, first, first + range_bytes, NAMES):
                found += chunk.content

        assert found == path.read_bytes()[extent.start : extent.end]


@settings(max_examples=40, deadline=None)
@given(st.lists(ROWS, max_size=12), EDITS, st.integers(1, 4))
def test_partitions_hold_every_post_and_counts_add_up(rows, edits, count):
    chunk = edit("".join(rows).encode(), edits)
    with TemporaryDirectory() as folder, patch.object(imports, "count_partitions", lambda _: count):
        path = Path(folder, "Posts.xml")
        path.write_bytes(posts_xml(chunk, "\n" if chunk and not chunk.endswith(b"\n") else ""))
        extent = find_extent(path, "posts")
        params = {
            "extent": {"start": extent.start, "end": extent.end, "lines": extent.lines},
            "range_bytes": 1 << 20,
            "partitions": count,
            "source": "se",
        }
        work = Work(Path(folder))
        report = work.one(imports.parse_range, Job("se.posts-00000.arrow", (path,)), params)
        made = Path(folder, report.shard.file)
        partitions = [read_partition([made], number, count)[0] for number in range(count)]

    report.counts.check("range")
    assert sum(posts.num_rows for posts in partitions) == report.counts.used
    for number, posts in enumerate(partitions):
        for post in posts.to_pylist():
            key = post["id"] if post["type"] == 1 else post["parent"]
            assert partition_of(np.array([key]), count).tolist() == [number]


SELECTIONS = st.fixed_dictionaries(
    {
        "select": st.sampled_from(["accepted", "best", "top-k", "all"]),
        "top_k": st.integers(1, 3),
        "min_answer_score": st.one_of(st.none(), st.integers(-2, 5)),
        "min_question_score": st.one_of(st.none(), st.integers(-2, 5)),
        "pairs": st.booleans(),
        "max_pairs": st.integers(1, 3),
        "max_records": st.one_of(st.none(), st.integers(1, 6)),
        "closed_questions": st.sampled_from(["keep", "drop"]),
    }
)
IDS = st.integers(1, 12)  # few, so that answers meet questions, and ids each other
BODIES = st.sampled_from(["", " ", "<p>a</p>", "<p>b</p>", "<pre><code>c</code></pre>"])
POSTS = st.one_of(
    st.builds(
        question,
        IDS,
        Body=BODIES,
        Title=st.sampled_from(["", "t"]),
        Score=st.integers(-3, 9),
        AcceptedAnswerId=st.one_of(st.none(), IDS),
        ClosedDate=st.sampled_from([None, "2020-01-01T00:00:00.000"]),
    ),
    st.builds(answer, IDS, IDS, Body=BODIES, Score=st.integers(-3, 9)),
    st.builds(row, Id=IDS, PostTypeId=st.integers(3, 9)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(POSTS, max_size=25), SELECTIONS, st.integers(1, 3))
def test_every_post_is_counted_once_whatever_is_selected(rows, keys, count):
    with TemporaryDirectory() as folder, patch.object(imports, "count_partitions", lambda _: count):
        Path(folder, "Posts.xml").write_bytes(posts_xml(*rows))
        source = StackExchangeSource.model_validate(dump_source(folder, **keys))
        raw = stack_exchange.locate(source)
        given_ = {
            "id": "se", "license": None, "openai_outputs": False, "first": 0,
            "limit": source.max_records, "origin": {"revision": "r"},
        }  # fmt: skip
        work = Work(Path(folder, "work"))
        work.path.mkdir()
        made = stack_exchange.read(source, raw, work, given_)
        records = [row for r in made.reports for row in read_rows(work.path / r.shard.file)]

    counts = sum((report.counts for report in made.reports), made.unread)
    counts.check("all")
    made.unread.check("unread")
    assert counts.rows_in == len(rows)
    assert counts.rows_out == len(records) <= (source.max_records or len(records))
    for record in records:
        assert record["prompt"]
        assert record["completion"]
