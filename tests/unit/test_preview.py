"""A preview says what would be read of a path, and gives the recipe entry that reads it."""

import gzip
import json

import pytest
import yaml

from pipelines.errors import RecipeError, SourceError
from pipelines.sources.preview import detect_source, preview
from tests.assets.curation import curation_recipe, write_files
from tests.assets.datasets import ALPACA, collect, lines, pairs

TREE = {"message_tree_id": "t", "prompt": {"message_id": "t", "text": "Hi", "role": "prompter"}}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"rows.jsonl": lines(*ALPACA)}, "dataset"),
        ({"rows.json": json.dumps(ALPACA)}, "dataset"),
        ({"rows.csv": "prompt,completion\na,b\n"}, "dataset"),
        ({"train.jsonl": lines(*pairs("a")), "load.py": "x = 1\n"}, "dataset"),
        ({"codegen-instruct.json": json.dumps(ALPACA), "LICENSE": "MIT"}, "gpteacher"),
        ({"code_alpaca_20k.json": json.dumps(ALPACA)}, "code-alpaca"),
        ({"trees.jsonl": lines(TREE)}, "oasst"),
        ({"a.py": "x = 1\n", "b.py": "y = 2\n", "data.json": "[]"}, "repository"),
        ({"package/a.py": "x = 1\n"}, "repository"),
        ({"Posts.xml": "<posts />", "Users.xml": "<users />"}, "stack-exchange"),
        ({"stats.stackexchange.com.7z": b"7z"}, "stack-exchange"),
        ({"qa.jsonl": lines({"code": "x", "question": "Why?", "answer": "So."})}, "code-qa"),
    ],
)
def test_the_source_type_is_told_by_what_a_folder_holds(tmp_path, files, kind):
    write_files(tmp_path / "My Data", files)

    entry = detect_source(tmp_path / "My Data")

    assert (entry["type"], entry["id"]) == (kind, "my-data")
    assert entry["path"] == str(tmp_path / "My Data")


@pytest.mark.parametrize(
    ("name", "kind", "slug"),
    [
        ("My Rows.v2.jsonl.gz", "dataset", "my-rows-v2"),
        ("demo-1.0.tar.gz", "repository", "demo-1-0"),
        ("stats.stackexchange.com.7z", "stack-exchange", "stats-stackexchange-com"),
    ],
)
def test_a_file_or_archive_is_told_by_its_name(tmp_path, name, kind, slug):
    write_files(tmp_path, {name: gzip.compress(lines(*ALPACA).encode(), mtime=0)})

    entry = detect_source(tmp_path / name)

    assert (entry["type"], entry["id"]) == (kind, slug)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl.gz", gzip.compress(lines(*ALPACA).encode(), mtime=0)[:-12], "damaged or cut off"),
        (
            "a.json.gz",
            gzip.compress(json.dumps(ALPACA).encode(), mtime=0)[:-12],
            "damaged or cut off",
        ),
        ("a.csv.gz", b"prompt,completion\na,b\n", "damaged or cut off"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(TREE).encode(), mtime=0) + b"garbage",
            "damaged or cut off",
        ),
        ("a.jsonl.xz", b"{}", "damaged or cut off"),
        ("a.jsonl.bz2", b"{}", "damaged"),
    ],
)
def test_a_damaged_compressed_file_is_refused_before_its_type_is_told(
    tmp_path, name, content, cause
):
    write_files(tmp_path, {name: content})

    with pytest.raises(SourceError, match=rf"{name}: {cause} .*; download it again"):
        preview(tmp_path / name)


def test_a_preview_shows_schema_counts_problems_and_records(tmp_path):
    rows = lines(*ALPACA, "{bad", {"instruction": "x", "output": ""}, *ALPACA[:1])
    write_files(tmp_path / "in", {"train.jsonl": rows, "test.jsonl": lines(*ALPACA)})

    text = preview(tmp_path / "in", limit=1)

    assert (
        text
        == f"""\
type       dataset
files      2 (test.jsonl, train.jsonl)
schema     pair: prompt = instruction, input = input, completion = output
rows       7 read as 5 records
splits     test 2, train 3
licenses   unknown 5

quarantined 1 invalid_json
            in:train.jsonl:3: row 3: Expecting property name enclosed in double quotes: \
line 1 column 2 (char 1)
dropped     1 empty_completion
            in:train.jsonl:4: row 4: the completion is empty

record     in:train.jsonl:1
  prompt     "Add the numbers.\\n\\n### Input:\\n1 and 2"
  completion "3"

sources:
- type: dataset
  id: in
  path: {tmp_path}/in
  allow_unlicensed: true
"""
    )


def test_the_entry_of_a_preview_reads_the_same_records(tmp_path):
    write_files(tmp_path / "in", {"codegen-instruct.json": json.dumps(ALPACA)})

    text = preview(tmp_path / "in" / "codegen-instruct.json")
    entry = yaml.safe_load(text[text.index("sources:") :])["sources"]
    records, _ = collect(tmp_path, *entry)

    assert curation_recipe(*entry).sources[0].openai_outputs
    assert len(records) == 2


def test_settings_replace_what_is_detected(tmp_path):
    write_files(tmp_path, {"rows.jsonl": lines({"ask": "Hi", "reply": "Hello"})})
    columns = {"prompt": "ask", "completion": "reply"}

    text = preview(tmp_path / "rows.jsonl", settings={"columns": columns, "license": "MIT"})

    assert "schema     pair: prompt = ask, completion = reply" in text
    assert "licenses   MIT 1" in text
    with pytest.raises(RecipeError, match="settings of the source: .*colums"):
        preview(tmp_path / "rows.jsonl", settings={"colums": columns})
    with pytest.raises(SourceError, match="no known schema"):
        preview(tmp_path / "rows.jsonl")


def test_of_much_data_only_the_first_records_are_made_but_all_rows_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources.preview.READ_WHOLE_BYTES", 100)
    monkeypatch.setattr("pipelines.sources.preview.RECORDS_OF_LARGE", 5)
    write_files(tmp_path, {"rows.jsonl": lines(*pairs(*range(40)))})

    text = preview(tmp_path / "rows.jsonl", limit=0)

    assert "rows       40 read as 5 records" in text
    assert "35 max_records" in text


def test_nothing_to_read_is_an_error(tmp_path):
    write_files(tmp_path / "in", {"notes.txt": "x"})

    with pytest.raises(SourceError, match="nothing here is known as code, rows"):
        detect_source(tmp_path / "in")
    with pytest.raises(SourceError, match="does not exist"):
        preview(tmp_path / "gone")
