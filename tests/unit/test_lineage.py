"""From a run back to every record it was trained on."""

import json
import shutil

import pytest
from click.testing import CliRunner

from pipelines.cli import starloom
from pipelines.errors import StoreError
from pipelines.lineage import build_lineage, records_of_run, trace_text
from pipelines.plan import STAGES
from pipelines.records import read_rows, write_rows
from pipelines.runs import Run, open_run
from pipelines.store import Store
from tests.assets.finished_runs import (
    TRAINED,
    build_all_stages,
    make_recipe_of_pairs,
    make_records,
)


def make_prepared_run(root, records=None):
    """Return (run, store) with all data stages and nothing trained."""
    recipe, store = make_recipe_of_pairs(), Store(root / "store")
    refs = build_all_stages(store, recipe, records or make_records())
    return open_run(recipe, refs, root / "runs"), store


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_prepared_run(tmp_path_factory.mktemp("lineage"))


@pytest.fixture
def copied(prepared, tmp_path):
    """The same run and store, to be damaged."""
    run, store = prepared
    shutil.copytree(store.root.parent, tmp_path / "copy")
    return Run(tmp_path / "copy/runs" / run.name), Store(tmp_path / "copy/store")


def test_the_records_of_a_run_are_those_in_its_packed_training_rows(prepared):
    found = list(records_of_run(*prepared))

    records = make_records()
    names = ("id", "source", "revision", "url", "author", "license")
    assert found == [{name: records[i][name] for name in names} for i in TRAINED]


def test_the_lineage_counts_what_was_collected_and_what_was_trained_on(prepared):
    lineage = build_lineage(*prepared)

    assert lineage["sources"]["kit"] == {
        "revision": "2.0",
        "license": "BSD-3-Clause",
        "files": 3,
        "records": 6,
        "used": {
            "records": 6,
            "licenses": {"BSD-3-Clause": 6},
            "authors": 0,
            "urls": 3,
            "examples": [f"https://example.org/kit/{i}" for i in (9, 11, 10)],
        },
    }
    used = lineage["sources"]["toy"]["used"]
    assert (used["records"], used["urls"], used["authors"]) == (7, 4, 3)
    assert len(used["examples"]) == 3


def test_the_lineage_holds_every_stage_in_order_and_what_it_was_made_from(prepared):
    run, store = prepared
    refs, stages = run.refs(), build_lineage(run, store)["stages"]

    assert [stage["stage"] for stage in stages] == [stage.name for stage in STAGES]
    for stage, plan in zip(stages, STAGES, strict=True):
        manifest = store.manifest(refs[plan.name])
        assert stage["digest"] == manifest.digest
        assert stage["upstream"] == {name: refs[name].digest for name in plan.upstream}
        lost = sum(stage["dropped"].values()) + sum(stage["quarantined"].values())
        assert stage["rows_in"] == stage["used"] + lost
        assert [(s["file"], s["sha256"]) for s in stage["shards"]] == [
            (shard.file, shard.sha256) for shard in manifest.shards
        ]
    left_out = {s["stage"]: s["dropped"] | s["quarantined"] for s in stages}
    assert {name: lost for name, lost in left_out.items() if lost} == {
        "collect": {"not_utf8": 2},
        "language": {"language:fr": 2},
        "quality": {"too_short": 1},
        "dedup": {"duplicate": 1},
        "tokenize": {"too_long": 1},
    }


def test_the_lineage_is_plain_json(prepared):
    lineage = build_lineage(*prepared)

    assert json.loads(json.dumps(lineage)) == lineage


def test_a_record_without_a_license_is_counted_under_none_stated(tmp_path):
    records = make_records(lambda i: None if i == 20 else "MIT" if i == 21 else "BSD-3-Clause")
    lineage = build_lineage(*make_prepared_run(tmp_path, records))

    assert lineage["sources"]["kit"]["used"]["licenses"] == {"": 1, "BSD-3-Clause": 4, "MIT": 1}
    assert "| (none stated) |" in trace_text(lineage)


def test_the_trace_shows_stages_sources_licenses_and_urls(prepared):
    run, _ = prepared
    lines = trace_text(build_lineage(*prepared)).split("\n")

    assert lines[0].startswith(f"run {run.name} (recipe quickstart, code ")
    refs = run.refs()
    split = refs["split"].digest[:12]
    upstream = f"decontaminate:{refs['decontaminate'].digest[:12]}"
    shown = next(line for line in lines if line.startswith("| split "))
    assert shown.split() == f"| split | {split} | 20 | 20 | - | {upstream} |".split()
    assert (
        "source kit, revision 2.0: 6 of 6 records in the training set, 3 urls, 0 authors" in lines
    )
    assert (
        "source toy, revision 1.0: 7 of 18 records in the training set, 4 urls, 3 authors" in lines
    )
    assert "| BSD-3-Clause |       7 |" in lines
    assert "- https://example.org/kit/9" in lines


@pytest.mark.parametrize("stage", ["collect", "dedup", "pack", "split"])
def test_a_stage_that_is_gone_is_named_with_the_command_that_rebuilds_it(copied, stage):
    run, store = copied
    folder = store.path(run.refs()[stage])
    shutil.rmtree(folder)

    with pytest.raises(StoreError) as error:
        build_lineage(run, store)

    assert str(error.value) == (
        f"run {run.name}: stage {stage!r} ({folder}) is no longer in the store; "
        "`starloom run quickstart` builds it again"
    )


def test_records_are_listed_as_long_as_the_split_and_the_packed_rows_are_there(copied):
    run, store = copied
    shutil.rmtree(store.path(run.refs()["collect"]))

    assert len(list(records_of_run(run, store))) == len(TRAINED)


def test_a_stage_rebuilt_with_another_result_is_not_taken_for_the_old_one(copied):
    run, store = copied
    ref = run.refs()["quality"]
    manifest = json.loads((store.path(ref) / "manifest.json").read_text())
    manifest["digest"] = "0" * 64
    (store.path(ref) / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(StoreError, match="stage 'quality' .* was rebuilt with another result"):
        build_lineage(run, store)


def test_packed_ids_that_the_split_does_not_know_are_an_error(copied, tmp_path):
    run, store = copied
    records = make_records()
    for record in records:
        record["id"] = record["id"].replace("kit:", "kat:")
    other, _ = make_prepared_run(tmp_path / "other", records)
    shard = "train-00000.parquet"
    foreign = Store(tmp_path / "other/store").path(other.refs()["split"]) / shard
    shutil.copyfile(foreign, store.path(run.refs()["split"]) / shard)

    with pytest.raises(
        StoreError, match="13 records are packed, but 7 of them are in the training"
    ):
        list(records_of_run(run, store))


def test_a_record_that_the_mixture_repeats_is_traced_once(copied):
    run, store = copied
    shard = store.path(run.refs()["split"]) / "train-00000.parquet"
    expected = list(records_of_run(run, store))
    rows = list(read_rows(shard))
    write_rows(shard, [row for row in rows for _ in range(1 + (row["source"] == "toy"))] + rows[:3])

    assert list(records_of_run(run, store)) == expected


def test_the_command_prints_every_record_as_json_lines(prepared, monkeypatch):
    run, store = prepared
    monkeypatch.setenv("STARLOOM_DATA", str(store.root.parent))

    done = CliRunner().invoke(starloom, ["trace", run.name, "--records"])

    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.split("\n") if line]
    assert [line["id"] for line in lines] == [record["id"] for record in make_records()][11:]
    assert {line["license"] for line in lines} == {"BSD-3-Clause"}
