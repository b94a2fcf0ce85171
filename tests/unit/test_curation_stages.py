"""From files to splits: the five stages together, on one and on two workers."""

import json
from itertools import pairwise

from tests.assets.curation import (
    STAGES,
    curation_recipe,
    folder_source,
    rows_of,
    run_stages,
    write_files,
)

MODULE = '''\
"""Module {number} computes things about number {number} and nothing else."""


def scale_{number}(values):
    """Return all of the given values multiplied by the number {number}."""
    factor_{number} = {number}
    return [value_{number} * factor_{number} for value_{number} in values]


def gib_{number}(werte):
    """Gibt alle uebergebenen Werte zurueck, die groesser als die Zahl {number} sind."""
    return [wert_{number} for wert_{number} in werte if wert_{number} > {number}]


def stub_{number}(values):
    """Return the values."""
    ...
'''


def test_every_file_and_record_is_accounted_for_and_workers_change_no_byte(tmp_path):
    folder = write_files(
        tmp_path / "code",
        {f"m{number:02d}.py": MODULE.format(number=number) for number in range(60)},
    )
    write_files(folder, {"broken.py": "def f(:\n", "copy.py": MODULE.format(number=7)})
    recipe = curation_recipe(folder_source(folder), split={"validation": 0.2, "test": 0.2})

    store, refs = run_stages(tmp_path / "1", recipe, workers=1)
    _, same = run_stages(tmp_path / "2", recipe, workers=2)
    counts = {name: store.manifest(refs[name]).counts for name in STAGES}

    assert {name: ref.digest for name, ref in refs.items()} == {
        name: ref.digest for name, ref in same.items()
    }
    assert counts["collect"].quarantined == {"does_not_parse": 1}
    assert counts["collect"].rows_out == 61 * 4
    assert counts["language"].dropped == {"language:de": 61}
    assert counts["quality"].dropped == {}
    assert counts["dedup"].dropped == {"exact_duplicate": 3}
    assert counts["split"].rows_out == 60 * 3
    for before, after in pairwise(STAGES):
        assert counts[after].rows_in == counts[before].rows_out
    groups = [
        {row["group"] for row in rows_of(store, refs["split"], split)}
        for split in ("train", "validation", "test")
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 60
    row = next(r for r in rows_of(store, refs["split"]) if r["id"].endswith("::scale_7"))
    assert json.loads(row["meta"])["language"] == "en"
    assert row["license"] == "MIT"
