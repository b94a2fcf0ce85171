"""What `starloom new --from` is given: files, folders, repositories, hub datasets, or nothing."""

import json

import pytest

from pipelines.errors import SourceError
from pipelines.recipe import load_recipe
from pipelines.scaffold import recipe_text, write_recipe
from pipelines.sources import check_sources
from pipelines.sources.origins import find_origin
from tests.assets.made_sources import make_source

ROWS = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(5)]
TALK = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


@pytest.mark.parametrize(
    ("recipe", "type_", "body"),
    [
        ("oasst", "oasst", "messages"),
        ("code-alpaca", "dataset", "prompt"),
        ("stack-exchange", "stack-exchange", "prompt"),
        ("scikit-learn", "repository", "code"),
    ],
)
def test_local_data_is_recognized_and_its_recipe_reads_it(tmp_path, recipe, type_, body):
    path = make_source(recipe, tmp_path / "raw")

    found = find_origin(str(path), "mine", license_="PSF-2.0")

    assert (found.source["type"], found.body) == (type_, body)
    assert {key: found.source[key] for key in ("id", "path", "license")} == {
        "id": "mine", "path": str(path), "license": "PSF-2.0",
    }  # fmt: skip
    text = recipe_text("mine", found.source, found.body, gpu=False)
    assert write_recipe("mine", text, tmp_path).sources[0].path == str(path)


@pytest.mark.parametrize(
    ("row", "body"),
    [(ROWS[0], "prompt"), ({"messages": TALK}, "messages"), ({"text": "x = 1\n" * 9}, "text")],
)
def test_the_body_of_the_rows_decides_the_template(tmp_path, row, body):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")

    assert find_origin(str(path), "mine").body == body


@pytest.mark.parametrize(
    "origin",
    [
        "https://github.com/scikit-learn/scikit-learn",
        "github.com/scikit-learn/scikit-learn.git",
        "git@github.com:scikit-learn/scikit-learn.git",
    ],
)
def test_a_repository_is_named_by_its_address(tmp_path, origin):
    found = find_origin(origin, "sk", revision="1.9.0")

    assert found.source == {
        "type": "repository", "id": "sk", "repository": "scikit-learn/scikit-learn",
        "revision": "1.9.0", "allow_unlicensed": True,
    }  # fmt: skip
    assert found.body == "code"
    write_recipe("sk", recipe_text("sk", found.source, found.body, gpu=True), tmp_path)
    assert load_recipe(str(tmp_path / "sk.yaml")).sources[0].revision == "1.9.0"


def test_the_recipe_of_a_repository_without_a_revision_asks_for_its_default_branch(tmp_path):
    found = find_origin("https://github.com/scikit-learn/scikit-learn", "sk")

    text = recipe_text("sk", found.source, found.body, gpu=False)
    check_sources(write_recipe("sk", text, tmp_path))
    assert "revision" not in found.source


def test_an_address_with_a_token_is_refused_without_showing_it():
    with pytest.raises(SourceError, match="set GITHUB_TOKEN in the environment") as caught:
        find_origin("https://ada:ghp_abc@github.com/ada/code", "mine")

    assert "ghp_abc" not in str(caught.value)


def test_a_dump_of_an_unknown_site_is_not_read_without_attribution(tmp_path):
    dump = make_source("stack-exchange", tmp_path / "stats.stackexchange.com")
    plain = dump.rename(tmp_path / "dump")

    with pytest.raises(SourceError, match="'mine': the site of the dump .* set `site:`"):
        find_origin(str(plain), "mine")
    named = plain.rename(tmp_path / "stats.stackexchange.com")
    assert find_origin(str(named), "mine").source == {
        "type": "stack-exchange", "id": "mine", "path": str(named),
    }  # fmt: skip


def test_a_hub_dataset_is_pinned_to_its_commit_and_fetched_once(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("STARLOOM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "a" * 40})
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))

    found = find_origin("ada/questions", "qa")

    assert found.source == {
        "type": "dataset", "id": "qa", "dataset": "ada/questions", "revision": "a" * 40,
        "allow_unlicensed": True,
    }  # fmt: skip
    assert found.body == "prompt"


def test_nothing_at_all_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()

    with pytest.raises(SourceError, match="no such file or folder here, and neither a GitHub"):
        find_origin("./nowhere", "mine")
    with pytest.raises(SourceError, match="nothing here is known as code"):
        find_origin(str(tmp_path / "empty"), "mine")


def test_known_output_of_openai_models_is_taken_only_where_that_is_allowed_by_name(tmp_path):
    path = make_source("gpteacher", tmp_path).rename(tmp_path / "codegen-instruct.json")

    with pytest.raises(SourceError, match="--allow-openai-outputs says that you may train on it"):
        find_origin(str(path), "mine")

    found = find_origin(str(path), "mine", allow_openai_outputs=True)
    assert (found.source["type"], found.source["allow_openai_outputs"]) == ("gpteacher", True)
