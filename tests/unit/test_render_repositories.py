"""fim.repository_order through the rendering stages: what shards, counts and lineage say."""

import json

import pytest
from tokenizers import Tokenizer

from pipelines.errors import RecipeError, TemplateError
from pipelines.lineage import _packed_ids
from pipelines.render.pack import unpack
from pipelines.render.repositories import STARCODER2
from pipelines.training.collate import PackedDataset
from tests.assets.rendering import (
    read_stream,
    record,
    render_stages,
    rendering_recipe,
    small_tokenizer,
)


def repository_file(number, repository, path, text):
    meta = {"kind": "file", "repository": repository, "path": path}
    return {**record(f"s:{number}", text=text), "meta": json.dumps(meta)}


FILES = [
    repository_file(number, f"o/{number % 3}", f"{9 - number}.py", f"x = {number}\n" * (number + 1))
    for number in range(8)
]
PAIR = record("s:pair", prompt="Say a.", completion="a")


def save_tokenizer(folder, names):
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_special_tokens(list(names))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def joining_recipe(folder, **overrides):
    return rendering_recipe(
        tokenizer={"name_or_path": str(folder)},
        tokenization__block_size=128,
        fim__fim_rate=0,
        fim__repository_order=True,
        **overrides,
    )


def test_files_of_a_repository_are_one_document_with_all_their_records(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", STARCODER2)
    recipe = joining_recipe(tmp_path / "tokenizer")
    splits = {"train": [[PAIR, *FILES]], "validation": FILES[:2], "test": FILES[2:3]}

    store, refs = render_stages(tmp_path / "store", recipe, splits)
    _, ref = render_stages(tmp_path / "again", recipe, splits, workers=2)
    counts = {name: store.manifest(refs[name]).counts for name in ("format", "tokenize", "pack")}
    files = store.manifest(refs["format"]).report["splits"]["train"]
    rows = [row for _, path in store.shards(refs["pack"], "train") for row in read_stream(path)]
    text = {
        record_id: tokenizer.decode(ids, skip_special_tokens=False)
        for row in rows
        for record_id, ids, _ in unpack(row)
    }
    joined = {
        first: more
        for row in rows
        for first, more in zip(row["record_ids"], row["joined_ids"], strict=True)
    }

    assert text["s:6"] == (
        f"<repo_name>o/0<file_sep>{FILES[6]['text']}<file_sep>{FILES[3]['text']}"
        f"<file_sep>{FILES[0]['text']}<|endoftext|>"
    )
    assert joined == {
        "s:6": ["s:3", "s:0"], "s:7": ["s:4", "s:1"], "s:5": ["s:2"], "s:pair": [],
    }  # fmt: skip
    assert (counts["format"].rows_in, counts["format"].used, counts["format"].rows_out) == (
        12, 12, 7,
    )  # fmt: skip
    assert (files["records"], files["rows"], files["fragments"]) == (9, 4, 8)
    assert counts["tokenize"].rows_in == counts["pack"].rows_in == 7
    assert sorted(_packed_ids(store, refs["pack"]).to_pylist()) == sorted(
        ["s:pair", *(row["id"] for row in FILES)]
    )
    assert refs["pack"].digest == ref["pack"].digest
    dataset = PackedDataset(store.path(refs["pack"]), "train")
    assert [len(dataset.sources(i)) for i in range(len(dataset))] == [
        len(row["lengths"]) for row in rows
    ]


def test_a_tokenizer_without_separators_is_an_error_that_names_them(tmp_path):
    save_tokenizer(tmp_path / "tokenizer", ["<repo_name>"])
    recipe = joining_recipe(tmp_path / "tokenizer")

    with pytest.raises(TemplateError, match=r"the tokenizer has no '<file_sep>', which files of a"):
        render_stages(tmp_path / "store", recipe, {"train": FILES})


def test_cuts_between_tokens_and_repository_order_exclude_each_other(tmp_path):
    with pytest.raises(RecipeError, match="repository_order joins files before they are tokens"):
        joining_recipe(tmp_path, fim__level="token")
