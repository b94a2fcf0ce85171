"""A hub dataset is fetched at one commit, from the cache where there is no network."""

import gzip
import hashlib
import json
import logging

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from pipelines.errors import SourceError
from pipelines.hub_access import hub_errors
from pipelines.settings.sources import OasstSource
from pipelines.sources import oasst
from pipelines.sources.fetch import fetch_source, raw_folder
from tests.assets.curation import curation_recipe, rows_of, run_stages, write_files
from tests.assets.oasst import json_lines, message, nest

COMMIT, NEWER = "a" * 40, "b" * 40
TREES = nest([message("p0"), message("a1", "p0")])
NAME = "2023-04-12_oasst_ready.trees.jsonl.gz"
KEYS = {"type": "oasst", "id": "o", "dataset": "OpenAssistant/oasst1", "license": "Apache-2.0"}


def source(**keys):
    return OasstSource.model_validate({**KEYS, **keys})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache of one commit, and no network."""
    root = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill(root, COMMIT, {NAME: gzip.compress(json_lines(TREES)), "README.md": "about"})
    return root


def fill(root, commit, files):
    folder = root / "datasets--OpenAssistant--oasst1"
    for name, content in files.items():
        blob = f"blobs/{commit[:3]}-{name.replace('/', '_')}"
        write_files(folder, {blob: content})
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / blob)
    write_files(folder, {"refs/main": commit})


def test_a_dataset_is_fetched_from_the_cache_and_read_at_its_commit(tmp_path, cache):
    fetched = fetch_source(source())

    assert (fetched.changed, fetched.counts["files"]) == (True, 1)
    assert fetched.summary == f"1 files of OpenAssistant/oasst1 at {COMMIT[:12]}"
    recipe = curation_recipe(KEYS)
    store, refs = run_stages(tmp_path / "store", recipe, until="collect")
    [row] = rows_of(store, refs["collect"])
    assert (row["id"], row["revision"]) == ("o:a1", COMMIT)
    assert row["url"] == "https://huggingface.co/datasets/OpenAssistant/oasst1"
    assert oasst.locate(source()).names == (NAME,)


def test_a_second_fetch_changes_nothing_and_says_so_and_a_newer_commit_replaces_it(cache):
    fetch_source(source())

    again = fetch_source(source(), refresh=True)
    fill(cache, NEWER, {NAME: gzip.compress(json_lines(TREES * 2))})
    newer = fetch_source(source(), refresh=True)

    assert fetch_source(source()) is None
    assert (again.changed, newer.changed) == (False, True)
    assert again.summary == f"OpenAssistant/oasst1 has not changed since {COMMIT[:12]}"
    assert oasst.locate(source()).origin.revision == NEWER
    folders = [p.name for p in raw_folder(source()).iterdir() if p.is_dir()]
    assert folders == [NEWER]


def test_a_fetch_that_was_killed_is_finished_and_cut_files_are_replaced(cache):
    fetch_source(source())
    folder = raw_folder(source())
    (folder / "fetched.json").unlink()
    (folder / COMMIT / NAME).write_bytes(b"cut")

    fetched = fetch_source(source())

    assert fetched.changed
    assert gzip.decompress((folder / COMMIT / NAME).read_bytes()) == json_lines(TREES)
    assert not list(folder.rglob("*.part"))


def test_the_first_kind_of_file_that_there_is_is_read_or_what_the_settings_name(cache):
    flat = json_lines([message("p0"), message("a1", "p0")])
    fill(cache, NEWER, {"data/train-00000-of-00001.parquet": b"x", "spam.jsonl.gz": flat})

    fetch_source(source())
    fetch_source(source(files=["spam*"]))

    assert oasst.locate(source()).names == ("data/train-00000-of-00001.parquet",)
    assert oasst.locate(source(files=["spam*"])).names == ("spam.jsonl.gz",)


def test_a_damaged_file_of_the_cache_is_not_accepted(cache):
    blobs = cache / "datasets--OpenAssistant--oasst1" / "blobs"
    link = blobs.parent / "snapshots" / COMMIT / NAME
    content = link.read_bytes()
    named = blobs / hashlib.sha256(content).hexdigest()
    named.write_bytes(content[:-1])
    link.unlink()
    link.symlink_to(named)

    with pytest.raises(
        SourceError, match=r"cache is damaged or cut off; delete .* and fetch again"
    ):
        fetch_source(source())
    named.write_bytes(content)

    assert fetch_source(source()).changed
    assert not list(raw_folder(source()).rglob("*.part"))


def test_a_snapshot_folder_of_the_cache_can_be_the_path(cache):
    folder = cache / "datasets--OpenAssistant--oasst1" / "snapshots" / COMMIT

    raw = oasst.locate(source(path=str(folder)))

    assert raw.names == (NAME,)
    assert raw.origin.url == "https://huggingface.co/datasets/OpenAssistant/oasst1"


def test_a_series_with_gaps_is_not_accepted(cache):
    fill(cache, NEWER, {"data/train-00000-of-00002.parquet": b"x"})

    with pytest.raises(SourceError, match=r"only 1 of 2 files data/train-\* of OpenAssistant"):
        fetch_source(source())


def test_a_dataset_without_files_to_read_says_what_to_name(cache):
    fill(cache, NEWER, {"README.md": "about"})

    with pytest.raises(SourceError, match=f"at {NEWER} holds no files to read; name them"):
        fetch_source(source())
    with pytest.raises(SourceError, match=r"that match \['x.jsonl'\]"):
        fetch_source(source(files=["x.jsonl"]))


def test_what_is_not_in_the_cache_is_a_clear_error_where_the_hub_is_switched_off(cache):
    with pytest.raises(SourceError) as caught:
        fetch_source(source(dataset="OpenAssistant/oasst2", revision="v9"))

    assert str(caught.value) == (
        "source 'o': OpenAssistant/oasst2 at v9 is not in the hub's cache and HF_HUB_OFFLINE is "
        "set; fetch it with network access or name a local `path:`"
    )


def hub_error(kind):
    import httpx

    request = httpx.Request("GET", "https://example.org/?token=hf_secret")
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("hf_secret", response=httpx.Response(403, request=request))
    return kind("hf_secret")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (errors.GatedRepoError, "it is gated: accept its terms on the hub and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such dataset or revision on the hub"),
        (errors.RevisionNotFoundError, "no such dataset or revision on the hub"),
        (errors.HfHubHTTPError, "could not be fetched (HfHubHTTPError); what has arrived"),
        (errors.HFValidationError, "could not be fetched (HFValidationError)"),
        (ConnectionResetError, "could not be fetched (ConnectionResetError)"),
        # What the client's own transport raises, whichever library it is.
        (hub_errors()[0], "could not be fetched (HTTPError)"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words_and_without_secrets(monkeypatch, caplog, kind, said):
    def refuse(*arguments, **keys):
        raise hub_error(kind)

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)

    with pytest.raises(SourceError) as caught:
        fetch_source(source())

    assert said in str(caught.value)
    assert "hf_secret" not in str(caught.value) + caplog.text


def test_the_token_is_left_to_the_library_and_the_revision_is_passed_on(monkeypatch, tmp_path):
    asked = []
    snapshot = write_files(tmp_path / "snapshots" / COMMIT, {NAME: gzip.compress(b"{}\n")})

    def download(dataset, **keys):
        asked.append((dataset, keys))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    fetch_source(source(revision="v1"))

    assert asked == [
        (
            "OpenAssistant/oasst1",
            {
                "repo_type": "dataset",
                "revision": "v1",
                "allow_patterns": ["*_ready.trees.jsonl.gz"],
            },
        )
    ]
    note = json.loads((raw_folder(source(revision="v1")) / "fetched.json").read_text())
    assert note["asked"]["revision"] == "v1"
    assert "hf_secret" not in json.dumps(note)


def test_a_damaged_origin_says_to_fetch_again(cache):
    fetch_source(source())
    (raw_folder(source()) / "origin.json").write_text("[")

    with pytest.raises(SourceError, match=r"no readable origin.json; delete the folder"):
        oasst.locate(source())
