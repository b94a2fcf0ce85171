"""Rows are the same whatever holds them, however many workers read; splits keep their names."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import PreflightError, SourceError
from pipelines.settings.sources import DatasetSource
from pipelines.sources import check_sources
from pipelines.sources.dataset import locate
from pipelines.sources.dataset.layout import card_license, split_of
from tests.assets.curation import curation_recipe, write_files
from tests.assets.datasets import body, collect, dataset_source, lines, pairs

ROWS = [
    {"prompt": 'a "quoted", one', "completion": "line\nbreak\r\nand \u2028 separator"},
    {"prompt": "日本語のコメント", "completion": "\tx = '🙂'"},
    {"prompt": "p", "completion": "{ [ \\ ] }"},
]
BODIES = [(row["prompt"], row["completion"]) for row in ROWS]


def as_table(delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_arrow(opener):
    table, sink = pa.Table.from_pylist(ROWS), io.BytesIO()
    with opener(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_parquet():
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return sink.getvalue()


TEXT = lines(*ROWS).encode()
FILES = {
    "rows.jsonl": TEXT,
    "rows.ndjson": TEXT.rstrip(b"\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + TEXT,
    "windows.jsonl": TEXT.replace(b"\n", b"\r\n"),
    "blank.jsonl": TEXT.replace(b"\n", b"\n\n"),
    "rows.jsonl.gz": gzip.compress(TEXT),
    "rows.jsonl.bz2": bz2.compress(TEXT),
    "rows.jsonl.xz": lzma.compress(TEXT),
    "rows.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=4, ensure_ascii=False).encode(),
    "lines.json": TEXT,
    "pages.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "data.json": json.dumps({"version": 1.5, "data": ROWS, "end": None}).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv": as_table(","),
    "semicolons.csv": as_table(";"),
    "bom.csv": b"\xef\xbb\xbf" + as_table(","),
    "rows.tsv": as_table("\t"),
    "rows.csv.gz": gzip.compress(as_table(",")),
    "rows.parquet": as_parquet(),
    "stream.arrow": as_arrow(pa.ipc.new_stream),
    "file.arrow": as_arrow(pa.ipc.new_file),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_yields_the_same_rows(tmp_path, name):
    write_files(tmp_path, {name: FILES[name]})

    records, manifest = collect(tmp_path, dataset_source(tmp_path / name))

    assert [body(record) for record in records] == BODIES
    assert (manifest.counts.rows_in, manifest.counts.used) == (3, 3)


def test_zstd_is_read(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    write_files(tmp_path, {"rows.jsonl.zst": zstd.compress(TEXT)})

    records, _ = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl.zst"))

    assert [body(record) for record in records] == BODIES


@pytest.mark.parametrize("size", [7, 64, 1000, 10_000])
def test_ranges_of_bytes_and_workers_do_not_change_the_records(tmp_path, monkeypatch, size):
    rows = [{"prompt": f"p{n}", "completion": "c" * (n % 50)} for n in range(1, 100)]
    write_files(tmp_path, {"rows.jsonl": lines(*rows[:50], "", "{bad", *rows[50:])})
    source = dataset_source(tmp_path / "rows.jsonl")
    whole, counted = collect(tmp_path, source, store="whole")
    monkeypatch.setattr("pipelines.sources.dataset.units.RANGE_BYTES", size)

    cut, manifest = collect(tmp_path, source, store="cut")

    assert cut == whole
    assert manifest.counts == counted.counts
    assert manifest.counts.quarantined == {"invalid_json": 1}
    assert manifest.report["samples"]["invalid_json"][0]["id"] == "d:rows.jsonl:52"


def test_the_number_of_workers_does_not_change_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources.dataset.units.RANGE_BYTES", 2000)
    write_files(tmp_path, {"a.jsonl": lines(*pairs(*range(100))), "b.csv": as_table(",")})
    source = dataset_source(tmp_path, exclude=["store*/**"])

    _, one = collect(tmp_path, source, store="store1")
    _, two = collect(tmp_path, source, workers=2, store="store2")

    assert len(one.shards) > 3
    assert (one.digest, one.counts) == (two.digest, two.counts)


def test_many_workers_have_nothing_to_do_with_little(tmp_path):
    write_files(tmp_path / "in", {"rows.jsonl": TEXT, "empty.jsonl": ""})
    write_files(tmp_path / "none", {"empty.jsonl": "", "blank.jsonl": "\n"})

    records, _ = collect(tmp_path, dataset_source(tmp_path / "in"), workers=4)
    nothing, manifest = collect(
        tmp_path, dataset_source(tmp_path / "none"), workers=4, store="nothing"
    )

    assert len(records) == 3
    assert (nothing, manifest.counts.rows_in) == ([], 0)


def test_a_cap_takes_the_first_rows_and_counts_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources.dataset.units.RANGE_BYTES", 500)
    write_files(
        tmp_path / "in",
        {"test.jsonl": lines(*pairs("t")), "train.jsonl": lines(*pairs(*range(50)))},
    )
    source = dataset_source(tmp_path / "in", max_records=30, expected_rows=51)

    records, manifest = collect(tmp_path, source)

    assert [record["id"] for record in records] == [f"d:train.jsonl:{n}" for n in range(1, 31)]
    assert (manifest.counts.rows_in, manifest.counts.used) == (51, 30)
    assert manifest.counts.dropped == {"max_records": 21}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_ift-00000-of-00001-0123456789abcdef.parquet", "train"),
        ("train_sft.jsonl.gz", "train"),
        ("test/data-00000-of-00001.arrow", "test"),
        ("code.dev.jsonl", "validation"),
        ("valid.json", "validation"),
        ("alpaca-eval.csv", "validation"),
        ("test_cases.jsonl", None),
        ("training_notes.json", None),
        ("contest.jsonl", None),
        ("latest.jsonl", None),
    ],
)
def test_a_split_is_told_by_the_file_or_its_folder(name, split):
    assert split_of(name) == split


def test_predefined_splits_are_kept_and_selected(tmp_path):
    write_files(
        tmp_path / "in",
        {
            "data/train-00000-of-00001.jsonl": lines(*pairs("a", "b")),
            "data/test-00000-of-00001.jsonl": lines(*pairs("c")),
            "README.md": "---\nlicense: apache-2.0\n---\n# A card\n",
            "dataset_infos.json": "{}",
            "load.py": "raise SystemExit('run')",
        },
    )
    source = dataset_source(tmp_path / "in", license=None)

    records, manifest = collect(tmp_path, source)
    selected, _ = collect(tmp_path, {**source, "splits": ["test"]}, store="selected")

    splits = [json.loads(record["meta"])["split"] for record in records]
    assert splits == ["train", "train", "test"]
    assert manifest.report["sources"]["d"]["splits"] == {"test": 1, "train": 2}
    assert {record["license"] for record in records} == {"Apache-2.0"}
    assert [json.loads(record["meta"])["split"] for record in selected] == ["test"]


def test_rows_and_arrays_can_name_their_split(tmp_path):
    [a, b] = pairs("a", "b")
    write_files(tmp_path, {"both.json": json.dumps({"train": [a], "validation": [b]})})
    write_files(tmp_path, {"rows.jsonl": lines({**a, "split": "train"}, {**b, "split": "test"})})

    keyed, _ = collect(tmp_path, dataset_source(tmp_path / "both.json"))
    told, manifest = collect(
        tmp_path, dataset_source(tmp_path / "rows.jsonl", splits=["test"]), store="told"
    )

    assert [json.loads(r["meta"])["split"] for r in keyed] == ["train", "validation"]
    assert [json.loads(r["meta"])["split"] for r in told] == ["test"]
    assert manifest.counts.dropped == {"other_split": 1}


def test_a_dataset_saved_to_disk_is_read_by_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_list(ROWS[:2]),
        "test": datasets.Dataset.from_list(ROWS[2:]),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "in"))

    records, _ = collect(tmp_path, dataset_source(tmp_path / "in"))

    assert [body(record) for record in records] == BODIES
    splits = [json.loads(record["meta"])["split"] for record in records]
    assert splits == ["train", "train", "test"]
    (tmp_path / "in/train/data-00000-of-00001.arrow").unlink()
    with pytest.raises(
        SourceError, match=r"state\.json lists data-00000-of-00001\.arrow, which is"
    ):
        collect(tmp_path, dataset_source(tmp_path / "in"), store="again")


def test_both_layouts_of_code_alpaca_are_read(tmp_path):
    parquet = pa.Table.from_pylist(ROWS)
    for split in ("train", "test"):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(parquet, tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    rows = [{"instruction": "i", "input": "", "output": "o"}] * 2
    write_files(tmp_path, {"raw/code_alpaca_20k.json": json.dumps(rows, indent=4)})
    preset = {"type": "code-alpaca", "allow_openai_outputs": True}

    hub, _ = collect(tmp_path, dataset_source(tmp_path / "hub", **preset))
    raw, _ = collect(tmp_path, dataset_source(tmp_path / "raw", **preset), store="raw")

    assert [json.loads(r["meta"])["split"] for r in hub] == ["train"] * 3 + ["test"] * 3
    assert [body(r) for r in raw] == [("i", "o")] * 2
    assert all(json.loads(r["meta"])["openai_outputs"] for r in [*hub, *raw])


def test_another_number_of_rows_than_expected_names_both(tmp_path):
    write_files(tmp_path, {"rows.jsonl": TEXT})

    with pytest.raises(SourceError, match="'d': 3 rows, expected_rows is 4,535;"):
        collect(tmp_path, dataset_source(tmp_path / "rows.jsonl", expected_rows=4535))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"x.json": '[{"a": 1}, {"b"'},
            r"x\.json: not valid JSON at line 1: a row starts here and",
        ),
        ({"x.json": '[{"a": 1}\n{"b": 2}]'}, r"line 2: expected ',', found"),
        ({"x.json": '{"a": [{"x": 1}], "b": [{"y": 1}]}'}, "rows under 'a' as well as under 'b'"),
        ({"x.json": "hello"}, "none of the first 1 rows can be read; row 1: Expecting value"),
        ({"x.json": "[{}]".encode("utf-16")}, "is UTF-16; convert it to UTF-8"),
        ({"x.csv": 'a,b\n1,"2\n'}, "a quote opened in the row at line 2 is never closed"),
        ({"x.csv": "a,a\n1,2\n"}, "line 1 is no header of different column names"),
        ({"x.jsonl.gz": gzip.compress(TEXT, mtime=0)[:-9]}, "damaged or cut off"),
        ({"x.jsonl.gz": TEXT}, "damaged or cut off"),
        ({"x.jsonl.xz": lzma.compress(TEXT)[:-9]}, "damaged or cut off"),
        ({"x.parquet": as_parquet()[:-9]}, "damaged or no parquet file"),
        ({"x.arrow": b"nothing"}, "damaged or no arrow file"),
        (
            {"train-00000-of-00003.jsonl": TEXT},
            "2 of 3 parts are missing, the first is train-00001",
        ),
        ({"notes.txt": "x"}, r"no data files in .* \(looked for \.jsonl"),
        ({"data.pkl": b"\x80\x04."}, "no data files"),
    ],
)
def test_a_bad_file_is_one_error_that_says_where_and_why(tmp_path, files, said):
    write_files(tmp_path / "in", files)

    with pytest.raises(SourceError, match=said):
        collect(tmp_path, dataset_source(tmp_path / "in"))


def test_a_bad_row_in_a_document_or_table_costs_only_itself(tmp_path):
    deep = '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}"
    [a, b] = (json.dumps(row) for row in pairs("a", "b"))
    write_files(tmp_path / "in", {"x.json": f'[{a}, {deep}, {{"prompt": oops}}, 7, {b}]'})
    write_files(tmp_path / "in", {"y.csv": 'prompt,completion\na,b\nc\nd,"e"f\ng,h\n'})

    records, manifest = collect(tmp_path, dataset_source(tmp_path / "in"))

    found = {reason: [s["id"] for s in rows] for reason, rows in manifest.report["samples"].items()}
    assert [r["id"] for r in records] == ["d:x.json:1", "d:x.json:5", "d:y.csv:1", "d:y.csv:4"]
    assert found == {
        "nested_too_deep": ["d:x.json:2"],
        "invalid_json": ["d:x.json:3"],
        "not_an_object": ["d:x.json:4"],
        "bad_table_row": ["d:y.csv:2", "d:y.csv:3"],
    }


def test_a_snapshot_in_the_hub_cache_is_read_through_its_links(tmp_path):
    write_files(tmp_path, {"blobs/abc": TEXT, "secret.jsonl": TEXT})
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "rows.jsonl").symlink_to("../../blobs/abc")
    (snapshot / "other.jsonl").symlink_to(tmp_path / "secret.jsonl")

    raw = locate(DatasetSource(type="dataset", id="d", path=str(snapshot)))

    assert raw.names == ("rows.jsonl",)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"path": "nowhere"}, "path 'nowhere' does not exist"),
        ({}, "nothing to read; name a local"),
        ({"dataset": "a/b"}, "dataset a/b: no revision is given; pin revision: <sha>"),
        ({"dataset": "a/b", "revision": "main"}, "revision 'main' may move; pin revision: <sha>"),
        ({"dataset": "a", "revision": "0" * 40}, "dataset 'a' is no OWNER/NAME"),
        ({"dataset": "a/b", "repository": "a/b"}, "both `dataset`"),
        ({"repository": "a/b", "revision": "0" * 40}, "a `repository` needs `files:`"),
        ({"repository": "a/b", "revision": "0" * 40, "files": ["../x"]}, "lead out of the"),
        ({"type": "gpteacher"}, "holds output of OpenAI models"),
    ],
)
def test_what_cannot_be_read_is_said_before_a_run(keys, said):
    recipe = curation_recipe({"type": "dataset", "id": "d", **keys})

    with pytest.raises(PreflightError, match=said):
        check_sources(recipe)


def test_a_preset_knows_its_place_and_rows_only_of_what_it_means():
    source = DatasetSource(type="gpteacher", id="g")
    other = DatasetSource(type="gpteacher", id="g", repository="someone/else")
    local = DatasetSource(type="code-alpaca", id="g", path="x.json")
    moved = DatasetSource(type="code-alpaca", id="g", revision="1" * 40)

    assert (source.repository, len(source.revision), source.expected_rows) == (
        "teknium1/GPTeacher", 40, 4535,
    )  # fmt: skip
    assert source.files == tuple(source.sha256)
    assert (other.revision, other.expected_rows, other.openai_outputs) == (None, None, True)
    assert (local.dataset, local.expected_rows, local.openai_outputs) == (None, None, True)
    assert (moved.dataset, moved.expected_rows) == ("HuggingFaceH4/CodeAlpaca_20K", None)


def test_a_card_names_a_license_or_none(tmp_path):
    for text, expected in (
        ("---\nlicense: cc-by-sa-4.0\n---\n", "CC-BY-SA-4.0"),
        ("---\ntags: [a]\nlicense: 'mit'\n---\n", "MIT"),
        ("---\nlicense: other\n---\n", None),
        ("license: mit\n", None),
    ):
        write_files(tmp_path, {"README.md": text})
        assert card_license(tmp_path) == expected


@pytest.mark.parametrize(
    ("folder", "kind", "rows"),
    [("gpteacher_codegen", "gpteacher", 4535), ("alpaca_seed_tasks", "dataset", 175)],
)
def test_the_real_sets_have_their_rows(tmp_path, monkeypatch, folder, kind, rows):
    real = real_data() / folder
    keys = {"type": kind, "allow_openai_outputs": True, "expected_rows": rows}

    records, manifest = collect(tmp_path, dataset_source(real, **keys))

    assert (len(records), manifest.counts.used) == (rows, rows)
    assert manifest.counts.quarantined == manifest.counts.dropped == {}


def real_data():
    import os

    folder = os.environ.get("STARLOOM_REAL_DATA")
    if not folder:
        pytest.skip("STARLOOM_REAL_DATA is not set")
    return Path(folder)
