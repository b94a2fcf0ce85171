"""The funnel: every stage, every source, and samples of what was left out."""

from dataclasses import replace

from pipelines.funnel import funnel_text
from pipelines.manifest import Cost, Counts, Manifest
from tests.assets.curation import curation_recipe, folder_source, run_stages, write_files

DOC = '"""The mean of the given values, or an error when there are none."""'


def funnel(tmp_path, *sources):
    store, refs = run_stages(tmp_path / "store", curation_recipe(*sources))
    manifests = {name: store.manifest(ref) for name, ref in refs.items()}
    return funnel_text(manifests, {"collect": True}), manifests


def code(number):
    return f"def mean_{number}(values):\n    {DOC}\n    return sum(values) / {number}\n"


def test_rows_are_shown_by_stage_and_source_with_reasons_and_samples(tmp_path):
    one = write_files(tmp_path / "one", {f"{n}.py": code(n) for n in range(30)})
    two = write_files(tmp_path / "two", {"x.py": code(3), "long.py": f"x = {list(range(500))}\n"})

    text, manifests = funnel(
        tmp_path, folder_source(one, id="a"), folder_source(two, id="b", epochs=2)
    )

    assert "| stage         | rows in | used | rows out |" in text
    for name, manifest in manifests.items():
        assert f"| {name} " in text
        lost = manifest.counts.rows_in - manifest.counts.used
        assert lost == sum(manifest.counts.dropped.values()) + sum(
            manifest.counts.quarantined.values()
        )
    assert "reused, " in text.split("\n")[2]
    by_source = text.partition("## By source")[2].partition("##")[0]
    assert [line.split()[1] for line in by_source.split("\n") if line.startswith("| a ")]
    assert "long_line 1" in by_source
    assert "`b:long.py`: x = [0, 1, 2" in text.replace("\\", "")
    mixture = text.partition("## Mixture")[2].partition("##")[0]
    [twice] = [line.split() for line in mixture.split("\n") if line.startswith("| b ")]
    assert twice[1:6:2] == ["b", "-", "2"]


def test_one_source_taken_once_has_no_mixture_to_show(tmp_path):
    one = write_files(tmp_path / "one", {f"{n}.py": code(n) for n in range(30)})

    text, _ = funnel(tmp_path, folder_source(one, id="a"))

    assert "## Mixture" not in text


def test_names_and_samples_cannot_break_the_page():
    manifest = Manifest(
        stage="quality", key="k", key_parts={}, digest="d", shards=(),
        upstream={}, upstream_keys={},
        versions={}, git_sha="", flow_run_id="", created="",
        counts=Counts(rows_in=1, dropped={"a|b": 1}), cost=Cost(0.0, 0.0, 0),
        report={"samples": {"a|b": [{"id": "r", "reason": "a|b", "detail": "<b>\n# x"}]}},
    )  # fmt: skip

    text = funnel_text({"quality": manifest, "dedup": replace(manifest, report={})}, {})

    assert "<b>" not in text.replace("\\<b>", "")
    assert "\n# x" not in text
