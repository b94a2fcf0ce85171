"""One bad row never ends a run: it is counted under a reason, with its number."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import SourceError
from tests.assets.curation import write_files
from tests.assets.datasets import body, collect, dataset_source, lines, pairs


def turns(*roles):
    return {"messages": [{"role": role, "content": f"{n}"} for n, role in enumerate(roles)]}


def left_out(manifest):
    samples = manifest.report["samples"]
    return {
        reason: [sample["id"].rpartition(":")[2] for sample in found]
        for reason, found in samples.items()
    }


def test_bad_lines_are_quarantined_with_their_numbers(tmp_path):
    [good] = pairs("good")
    deep = '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}"
    bad = [
        "{broken",
        deep,
        "[1, 2]",
        json.dumps({"prompt": "x", "completion": 7}),
        json.dumps({"prompt": "x\0", "completion": "y"}),
        '{"prompt": "\\ud800", "completion": "y"}',
        json.dumps({"prompt": "x", "completion": " "}),
        json.dumps({"prompt": "", "completion": "y"}),
        "",
        '{"prompt": "n", "completion": "' + "9" * 10 + '", "big": ' + "9" * 5000 + "}",
    ]
    text = lines(good, *bad).encode() + b'{"prompt": "\xff", "completion": "y"}\n'
    write_files(tmp_path, {"rows.jsonl": text + lines(*pairs("last")).encode()})

    records, manifest = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl"))

    assert [record["id"] for record in records] == ["d:rows.jsonl:1", "d:rows.jsonl:13"]
    assert left_out(manifest) == {
        "invalid_json": ["2", "11"],
        "nested_too_deep": ["3"],
        "not_an_object": ["4"],
        "not_text": ["5"],
        "unstorable_text": ["6", "7"],
        "empty_completion": ["8"],
        "empty_prompt": ["9"],
        "invalid_utf8": ["12"],
    }
    counts = manifest.counts
    assert (counts.rows_in, counts.used, counts.rows_out) == (12, 2, 2)
    assert counts.dropped == {"empty_completion": 1, "empty_prompt": 1}
    assert sum(counts.quarantined.values()) == 8


@pytest.mark.parametrize(
    ("roles", "strict", "merged"),
    [
        ("user assistant user", "012", "012"),
        ("system user assistant", "012", "012"),
        ("user user assistant", "bad_alternation", "0\n\n1|2"),
        ("user assistant assistant", "bad_alternation", "0|1\n\n2"),
        ("assistant user assistant", "bad_alternation", "bad_alternation"),
        ("user system assistant", "bad_alternation", "bad_alternation"),
        ("user", "no_assistant", "no_assistant"),
        ("", "no_assistant", "no_assistant"),
        ("user tool assistant", "unknown_role", "unknown_role"),
    ],
)
def test_roles_have_to_alternate_or_are_merged(tmp_path, roles, strict, merged):
    write_files(tmp_path, {"rows.jsonl": lines(turns("user", "assistant"), turns(*roles.split()))})
    for rule, expected in (("strict", strict), ("merge", merged)):
        source = dataset_source(tmp_path / "rows.jsonl", roles=rule)
        records, manifest = collect(tmp_path, source, store=rule)
        found = ["|".join(text for _, text, _ in body(record)) for record in records[1:]]
        reasons = list(manifest.report["samples"])
        assert [*(text.replace("|", "") for text in found), *reasons] == [expected.replace("|", "")]


def test_turns_that_say_so_are_not_trained(tmp_path):
    row = turns("user", "assistant", "user", "assistant")
    row["messages"][1]["train"] = False
    nothing = turns("user", "assistant")
    nothing["messages"][1]["weight"] = 0
    write_files(tmp_path, {"rows.jsonl": lines(row, nothing)})

    [record], manifest = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl"))

    assert [train for _, _, train in body(record)] == [False, False, False, True]
    assert manifest.counts.dropped == {"nothing_trained": 1}


def test_invalid_text_in_a_parquet_file_costs_its_row_only(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": column, "completion": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "rows.parquet")

    records, manifest = collect(tmp_path, dataset_source(tmp_path / "rows.parquet"))

    assert [record["prompt"] for record in records] == ["good", "fine"]
    assert left_out(manifest) == {"invalid_utf8": ["2"]}


def test_a_row_longer_than_any_memory_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources.dataset.units.MAX_ROW_BYTES", 100)
    long = {"prompt": "x" * 1000, "completion": "y"}
    write_files(tmp_path, {"rows.jsonl": lines(*pairs("a"), long, *pairs("b"))})

    records, manifest = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl"))

    assert [record["id"][-1] for record in records] == ["1", "3"]
    assert manifest.counts.quarantined == {"row_too_long": 1}


def test_code_above_the_size_limit_is_dropped(tmp_path):
    rows = [{"content": "x = 1\n", "path": "a.py"}, {"content": "x" * 1_000_001, "path": "b.py"}]
    write_files(tmp_path, {"rows.jsonl": lines(*rows)})

    [record], manifest = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl"))

    assert json.loads(record["meta"]) == {"file": "rows.jsonl", "path": "a.py", "row": 1}
    assert manifest.counts.dropped == {"too_large": 1}


def test_a_file_of_nothing_but_bad_rows_is_an_error(tmp_path):
    write_files(tmp_path, {"rows.jsonl": "{a\n{b\n"})

    with pytest.raises(SourceError, match="none of the first 2 rows can be read; row 1: Expecting"):
        collect(tmp_path, dataset_source(tmp_path / "rows.jsonl"))
