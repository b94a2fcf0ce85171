"""A repository is read from a folder or an installed distribution; every file is accounted for."""

import ast
import hashlib
import json
import os

import pytest

from pipelines.errors import PreflightError, SourceError
from pipelines.plan import get_stage, stage_spec
from pipelines.settings.sources import RepositorySource as Source
from pipelines.sources import check_sources, get_source, repository
from pipelines.sources.collect import params
from pipelines.sources.licenses import metadata_license, recognize, spdx_of
from pipelines.sources.raw import glob_pattern, list_folder, select_names
from pipelines.sources.repository import locate
from tests.assets.curation import (
    curation_recipe,
    folder_source,
    rows_of,
    run_stages,
    write_files,
)

DOCUMENTED = '''\
def twice(x):
    """Return x twice."""
    return x + x
'''
METADATA = """\
Metadata-Version: 2.4
Name: demo-package
Version: 1.2.3
Author-email: Ada Lovelace <ada@example.org>
License-Expression: BSD-3-Clause
Project-URL: Homepage, https://demo.example.org
Project-URL: Source Code, https://github.com/demo/demo-package.git

"""


def collect(tmp_path, *sources, workers=1, **sections):
    recipe = curation_recipe(*sources, **sections)
    store, refs = run_stages(tmp_path / "store", recipe, until="collect", workers=workers)
    return rows_of(store, refs["collect"]), store.manifest(refs["collect"])


@pytest.fixture
def demo_package(tmp_path, monkeypatch):
    """An installed distribution with vendored code, tests, a script and a file that is gone."""
    site = write_files(
        tmp_path / "site",
        {
            "demo/__init__.py": "raise SystemExit('imported')\n",
            "demo/core.py": f"import os\n\n{DOCUMENTED}",
            "demo/tests/test_core.py": DOCUMENTED,
            "demo/vendored/LICENSE": "Permission is hereby granted, free of charge, to any",
            "demo/vendored/deep/part.py": "x = 1\n",
            "demo/vendored/own.py": "# SPDX-License-Identifier: 0BSD\nx = 2\n",
            "demo_package-1.2.3.dist-info/METADATA": METADATA,
            "demo_package-1.2.3.dist-info/licenses/LICENSE": "GNU GENERAL PUBLIC LICENSE Version 3",
        },
    )
    names = [p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file()]
    listed = "".join(f"{name},,\n" for name in [*names, "../../bin/demo.py", "demo/gone.py"])
    write_files(site, {"demo_package-1.2.3.dist-info/RECORD": listed})
    monkeypatch.syspath_prepend(str(site))
    return {
        "type": "repository",
        "id": "demo",
        "distribution": "demo-package",
        "exclude": ["**/tests/**"],
        "include_vendored": True,
    }


def test_an_installed_distribution_yields_files_and_functions_with_their_provenance(
    tmp_path, demo_package
):
    rows, manifest = collect(tmp_path, demo_package)

    blob = "https://github.com/demo/demo-package/blob/1.2.3/demo"
    assert [(r["id"], r["license"], r["url"]) for r in rows] == [
        ("demo:demo/__init__.py", "BSD-3-Clause", f"{blob}/__init__.py"),
        ("demo:demo/core.py", "BSD-3-Clause", f"{blob}/core.py"),
        ("demo:demo/core.py::twice", "BSD-3-Clause", f"{blob}/core.py#L3-L5"),
        ("demo:demo/vendored/deep/part.py", "MIT", f"{blob}/vendored/deep/part.py"),
        ("demo:demo/vendored/own.py", "0BSD", f"{blob}/vendored/own.py"),
    ]
    assert rows[2] == {
        "id": "demo:demo/core.py::twice",
        "group": "demo:demo/core.py",
        "source": "demo",
        "revision": "1.2.3",
        "url": f"{blob}/core.py#L3-L5",
        "author": "Ada Lovelace",
        "license": "BSD-3-Clause",
        "created": None,
        "score": None,
        "messages": None,
        "prompt": "Return x twice.",
        "completion": "def twice(x):\n    \n    return x + x",
        "text": None,
        "meta": '{"kind":"function","lines":[3,5],"path":"demo/core.py"}',
    }
    assert rows[1]["text"] == f"import os\n\n{DOCUMENTED}"
    assert json.loads(rows[1]["meta"]) == {
        "kind": "file", "language": "Python", "lines": [1, 5], "path": "demo/core.py",
    }  # fmt: skip
    counts = manifest.counts
    assert (counts.rows_in, counts.used, counts.rows_out) == (5, 4, 5)
    assert counts.quarantined == {"unreadable": 1}
    assert manifest.report["sources"] == {
        "demo": {
            "type": "repository",
            "revision": "1.2.3",
            "url": "https://github.com/demo/demo-package",
            "author": "Ada Lovelace",
            "license": "BSD-3-Clause",
            "licenses": {"0BSD": 1, "BSD-3-Clause": 3, "MIT": 1},
            "openai_outputs": False,
            "files": 5,
            "records": 5,
            "skipped_functions": {},
        }
    }


def test_every_bad_file_is_quarantined_with_its_reason_and_the_others_are_used(tmp_path):
    folder = write_files(
        tmp_path / "code",
        {
            "bom.py": b"\xef\xbb\xbf" + DOCUMENTED.replace("\n", "\r\n").encode(),
            "broken.py": "def f(:\n",
            "deep.py": "+".join(["a"] * 50_000),
            "empty.py": b"",
            "blank.py": b"\n \n",
            "latin.py": "x = 'é'\n".encode("latin-1"),
            "nul.py": b"x = 1\0\n",
            "surrogate.py": 'def f():\n    "\\ud800"\n    return 1\n',
            "good.py": DOCUMENTED,
            "notes.txt": "no Python",
        },
    )
    with (folder / "huge.py").open("wb") as file:
        file.truncate(50_000_000)

    rows, manifest = collect(tmp_path, folder_source(folder))

    assert [row["id"] for row in rows] == [
        "s:bom.py", "s:bom.py::twice", "s:good.py", "s:good.py::twice", "s:surrogate.py",
    ]  # fmt: skip
    assert rows[0]["text"] == rows[2]["text"] == DOCUMENTED
    counts = manifest.counts
    assert (counts.rows_in, counts.used, counts.dropped) == (10, 3, {})
    assert counts.quarantined == {
        "does_not_parse": 1, "empty": 2, "not_utf8": 1, "nul_bytes": 1, "too_deep": 1,
        "too_large": 1,
    }  # fmt: skip
    samples = manifest.report["samples"]
    assert {reason: [s["id"] for s in found] for reason, found in samples.items()} == {
        "does_not_parse": ["s:broken.py"],
        "too_deep": ["s:deep.py"],
        "empty": ["s:blank.py", "s:empty.py"],
        "too_large": ["s:huge.py"],
        "not_utf8": ["s:latin.py"],
        "nul_bytes": ["s:nul.py"],
    }
    assert samples["too_large"][0]["detail"] == "50000000 bytes, at most 1000000"
    assert manifest.report["sources"]["s"]["skipped_functions"] == {"docstring_not_text": 1}


def test_hidden_folders_links_and_special_files_are_no_part_of_a_folder(tmp_path):
    outside = write_files(tmp_path / "outside", {"secret.py": "x = 1\n"})
    folder = write_files(
        tmp_path / "code", {"a.py": "x = 1\n", ".venv/b.py": "x = 1\n", ".c.py": "x = 1\n"}
    )
    (folder / "link.py").symlink_to(outside / "secret.py")
    (folder / "linked").symlink_to(outside)
    (folder / "inner.py").symlink_to(folder / "a.py")
    os.mkfifo(folder / "pipe.py")

    assert list(list_folder(folder)) == ["a.py"]


def test_a_file_name_that_is_no_text_is_quarantined(tmp_path):
    folder = write_files(tmp_path / "code", {"a.py": "x = 1\n"})
    (folder / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")

    rows, manifest = collect(tmp_path, folder_source(folder))

    assert [row["id"] for row in rows] == ["s:a.py"]
    assert manifest.counts.quarantined == {"bad_file_name": 1}
    assert manifest.report["samples"]["bad_file_name"][0]["id"] == r"s:caf\udce9.py"


def test_a_folder_is_named_by_its_content_and_its_records_by_relative_paths(tmp_path):
    folder = write_files(tmp_path / "code", {"pack age/a.py": DOCUMENTED})

    [text, function], manifest = collect(tmp_path, folder_source(folder))

    digest = hashlib.sha256(DOCUMENTED.encode()).hexdigest()
    whole = hashlib.sha256(b"pack age/a.py\0" + digest.encode() + b"\n").hexdigest()
    assert text["revision"] == function["revision"] == whole[:16]
    assert (text["url"], function["url"]) == ("pack age/a.py", "pack age/a.py#L1-L3")
    assert str(tmp_path) not in json.dumps([text, function, manifest.report, manifest.key_parts])


def test_a_folder_with_repository_and_revision_links_to_that_commit(tmp_path):
    folder = write_files(tmp_path / "code", {"pack age/a.py": "x = 1\n"})
    source = folder_source(folder, repository="demo/code", revision="v1")

    [row], _ = collect(tmp_path, source)

    assert row["url"] == "https://github.com/demo/code/blob/v1/pack%20age/a.py"
    assert row["revision"] == "v1"


def test_the_license_is_the_recipe_s_then_the_file_s_then_the_nearest_folder_s(tmp_path):
    folder = write_files(
        tmp_path / "code",
        {
            "LICENSE": "Apache License\n  Version 2.0, January 2004",
            "a.py": "x = 1\n",
            "b.py": "# SPDX-License-Identifier: MIT OR Apache-2.0\nx = 2\n",
            "vendored/COPYING.txt": "All rights reserved.",
            "vendored/c.py": "x = 3\n",
        },
    )

    guessed, _ = collect(tmp_path, folder_source(folder, license=None, include_vendored=True))
    named, _ = collect(tmp_path, folder_source(folder, license="MPL-2.0", include_vendored=True))

    assert [row["license"] for row in guessed] == [
        "Apache-2.0", "MIT OR Apache-2.0", "see vendored/COPYING.txt",
    ]  # fmt: skip
    assert {row["license"] for row in named} == {"MPL-2.0"}


def test_a_file_without_any_license_stops_the_run_and_says_what_to_set(tmp_path):
    folder = write_files(tmp_path / "code", {"a.py": "x = 1\n"})

    with pytest.raises(SourceError) as caught:
        collect(tmp_path, folder_source(folder, license=None))

    assert str(caught.value) == (
        "source 's': no license found for a.py; say which one it has with sources.0.license, "
        "e.g. license: BSD-3-Clause, or set sources.0.allow_unlicensed: true"
    )


def test_a_file_without_any_license_is_marked_unknown_where_the_recipe_allows_it(tmp_path):
    files = {"a.py": "x = 1\n", "b.py": "# SPDX-License-Identifier: MIT\ny = 2\n"}
    folder = write_files(tmp_path / "code", files)

    rows, _ = collect(tmp_path, folder_source(folder, license=None, allow_unlicensed=True))

    assert [row["license"] for row in rows] == ["unknown", "MIT"]


@pytest.mark.parametrize(
    ("text", "license_"),
    [
        ("MIT License\n\nPermission is hereby granted, free of charge, to any person", "MIT"),
        ("GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "GPL-3.0-only"),
        ("GNU LESSER GENERAL PUBLIC LICENSE\n Version 3", "LGPL-3.0-only"),
        ("Mozilla Public License Version 2.0, GNU General Public License, Version 2.0", "MPL-2.0"),
        ("Redistribution and use in source and binary forms. Neither the name", "BSD-3-Clause"),
        ("Redistribution and use in source and binary forms", "BSD-2-Clause"),
        ("All rights reserved", None),
    ],
)  # fmt: skip
def test_well_known_license_texts_are_recognized(text, license_):
    assert recognize(text) == license_


def test_license_fields_of_metadata_are_read_in_order_of_exactness():
    from email import message_from_string

    def read(*lines):
        return metadata_license(message_from_string("\n".join(lines)))

    osi = "Classifier: License :: OSI Approved :: BSD License"
    assert read("License-Expression: MIT", "License: BSD", osi) == "MIT"
    assert read("License: BSD", osi) == "BSD"
    assert read("License: UNKNOWN", osi) == "BSD License"
    assert read(f"License: {'long text ' * 20}", osi) == "BSD License"
    assert read("Classifier: License :: OSI Approved") is None
    assert spdx_of("x = 1\n/* SPDX-License-Identifier: GPL-2.0-or-later */\n") == "GPL-2.0-or-later"


@pytest.mark.parametrize("cap", [1, 3, 4, 1000])
def test_a_cap_keeps_the_first_records_and_counts_the_files_it_left_unread(tmp_path, cap):
    folder = write_files(
        tmp_path / "code", {f"m{number:03d}.py": DOCUMENTED for number in range(60)}
    )
    every, _ = collect(tmp_path, folder_source(folder))

    rows, manifest = collect(tmp_path, folder_source(folder, max_records=cap))

    counts = manifest.counts
    assert rows == every[:cap]
    assert counts.rows_in == 60
    assert counts.used == min((cap + 1) // 2, 60)
    assert counts.dropped == ({} if cap == 1000 else {"max_records": 60 - counts.used})


def test_shards_number_on_over_sources_and_hold_fifty_files_each(tmp_path):
    first = write_files(tmp_path / "a", {f"m{number:02d}.py": "x = 1\n" for number in range(51)})
    second = write_files(tmp_path / "b", {"m.py": "x = 1\n"})

    _, manifest = collect(tmp_path, folder_source(first), folder_source(second, id="t"))

    assert [(s.file, s.rows) for s in manifest.shards] == [
        ("records-00000.parquet", 50), ("records-00001.parquet", 1), ("records-00002.parquet", 1),
    ]  # fmt: skip
    assert list(manifest.report["sources"]) == ["s", "t"]


def test_the_key_follows_the_content_of_the_input_and_not_its_place(tmp_path):
    def key(folder, **keys):
        recipe = curation_recipe(folder_source(folder, **keys))
        return stage_spec(get_stage("collect"), recipe, {}).key

    here = write_files(tmp_path / "here", {"a.py": "x = 1\n"})
    there = write_files(tmp_path / "there", {"a.py": "x = 1\n"})
    before = key(here)

    assert key(there) == before
    assert key(here, license="BSD-3-Clause") != before
    write_files(here, {"a.py": "x = 2\n"})
    assert key(here) != before
    write_files(here, {"a.py": "x = 1\n", "b.py": "x = 1\n"})
    assert key(here) != before
    assert key(here, exclude=["b.py"]) != before
    (here / "b.py").unlink()
    assert key(here) == before


def test_params_hold_the_origin_and_digest_of_every_source(tmp_path, demo_package):
    [source] = params(curation_recipe(demo_package))["sources"]

    assert source["origin"] == {
        "revision": "1.2.3",
        "url": "https://github.com/demo/demo-package",
        "blob": "https://github.com/demo/demo-package/blob/1.2.3/",
        "author": "Ada Lovelace",
        "licenses": {"": "BSD-3-Clause", "demo/vendored": "MIT"},
        "created": None,
    }
    assert "path" not in source
    assert len(source["digest"]) == 64


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("**/tests/**", "tests/a.py", True),
        ("**/tests/**", "x/y/tests/z/a.py", True),
        ("**/tests/**", "x/mytests/a.py", False),
        ("*.py", "a.py", True),
        ("*.py", "x/a.py", False),
        ("x/**/a.py", "x/a.py", True),
        ("x/**", "x/y/a.py", True),
        ("a?.py", "a1.py", True),
        ("a?.py", "a/.py", False),
        ("a[1].py", "a[1].py", True),
    ],
)
def test_globs_match_whole_paths_part_by_part(glob, name, matches):
    assert bool(glob_pattern(glob).fullmatch(name)) == matches
    assert select_names([name], ".py", [glob]) == (() if matches else (name,))


def test_sources_that_cannot_be_read_here_are_all_listed_at_once(tmp_path):
    (tmp_path / "file.py").write_text("x = 1\n")
    recipe = curation_recipe(
        {"type": "repository", "id": "a", "path": str(tmp_path / "file.py")},
        {"type": "repository", "id": "b", "distribution": "scikit-lern"},
        {"type": "repository", "id": "c"},
        {"type": "repository", "id": "d", "repository": "https://example.org/a/b"},
        {"type": "repository", "id": "e", "repository": "a/b/tree/main"},
        {"type": "repository", "id": "f", "path": ".", "extensions": [".go"], "kinds": ["class"]},
        {"type": "repository", "id": "a", "path": str(tmp_path)},
    )

    with pytest.raises(PreflightError) as caught:
        check_sources(recipe)

    assert str(caught.value) == (
        f"sources.0: path {str(tmp_path / 'file.py')!r} is neither a folder nor an archive here; "
        "give a folder of code or a file that ends in .zip, .whl, .tar, .tar.gz, .tgz, .tar.bz2, "
        ".tbz2, .tar.xz, .txz; "
        "sources.1: distribution 'scikit-lern' is not installed, did you mean 'scikit-learn'?; "
        "install it or name a local `path:`; "
        "sources.2: nothing to read is named; give `path:` (a folder or an archive), "
        "`distribution:` (an installed package) or `repository:` (OWNER/NAME on GitHub); "
        "sources.3: repository 'https://example.org/a/b' is not on github.com; name its server's "
        "`api_url:` and `raw_url:`, or give a local `path:`; "
        "sources.4: repository 'a/b/tree/main' is neither OWNER/NAME nor a repository's address; "
        "give e.g. scikit-learn/scikit-learn, and a branch, tag or commit as `revision:`; "
        "sources.5: kinds ['class'] are of Python, but extensions are ['.go']; add `file` to kinds;"
        " "
        "sources.6.id: 'a' is taken by another source"
    )


def test_a_source_that_can_be_read_passes_and_a_path_wins_over_a_distribution(tmp_path):
    folder = write_files(tmp_path / "code", {"a.py": "x = 1\n"})
    source = Source(type="repository", id="s", distribution="scikit-learn", path=str(folder))

    check_sources(curation_recipe(source.model_dump()))

    assert locate(source).names == ("a.py",)
    assert get_source(source) is repository


def test_a_folder_without_python_files_is_an_error_that_says_what_was_excluded(tmp_path):
    folder = write_files(tmp_path / "code", {"tests/a.py": "x = 1\n"})

    with pytest.raises(SourceError, match=r"no .py files in .*code \(exclude: \['tests/\*\*'\]"):
        locate(Source.model_validate(folder_source(folder, exclude=["tests/**"])))


def test_the_installed_scikit_learn_yields_thousands_of_functions_that_parse(tmp_path):
    source = {
        "type": "repository",
        "id": "scikit-learn",
        "distribution": "scikit-learn",
        "exclude": ["**/tests/**"],
    }

    rows, manifest = collect(tmp_path, source)
    functions = [row for row in rows if row["completion"] is not None]
    files = [row for row in rows if row["text"] is not None]

    assert len(functions) > 2100
    assert len(files) > 250
    assert set(manifest.counts.quarantined) == {"empty"}
    assert manifest.counts.dropped["vendored"] > 20
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["group"] for row in rows}) == len(files) == manifest.counts.used
    assert {row["license"] for row in rows} == {"BSD-3-Clause"}
    assert {row["author"] for row in rows} == {"scikit-learn developers"}
    for row in functions:
        [node] = ast.parse(row["completion"]).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        lines = json.loads(row["meta"])["lines"]
        assert row["url"].endswith(f"#L{lines[0]}-L{lines[1]}")
