"""Files joined in repository order come back whole, with nothing but separators between them."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.errors import TemplateError
from pipelines.render.code_rows import CodeFormatter
from pipelines.render.drops import Drops
from pipelines.render.encode import encode_pieces
from pipelines.render.fim import restore_text
from pipelines.render.fragments import Splitter
from pipelines.render.repositories import STARCODER2, cut_series, find_place, find_separators
from pipelines.render.sentinels import STARCODER
from pipelines.render.text_encoder import open_encoder
from pipelines.settings.fim import Fim
from tests.assets.rendering import record, small_tokenizer

FILE_SEP = STARCODER2.file
TEXTS = st.text(st.sampled_from("ab \n<file_sep>x=1\u00e9"), min_size=1, max_size=120)
FILES = st.lists(
    st.tuples(st.sampled_from(["", "o/a", "o/b"]), st.text("abc/.", max_size=4), TEXTS), max_size=12
)


@functools.cache
def separating_tokenizer():
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_special_tokens(list(STARCODER2))
    tokenizer.encode_special_tokens = True
    return tokenizer


def joined(records, block_size, rate, limit):
    """Return the examples of records, and those whose file was dropped."""
    tokenizer = separating_tokenizer()
    splitter = Splitter(tokenizer, open_encoder(tokenizer, fast=True), block_size)
    formatter, drops = CodeFormatter(splitter, Fim(fim_rate=rate), STARCODER), Drops()
    places = [find_place(row) for row in records]
    found = []
    for numbers in cut_series(places, [len(row["text"]) for row in records], limit):
        groups = formatter.format([records[i] for i in numbers], drops)
        of_rows = [places[i] for i, group in zip(numbers, groups, strict=True) for _ in group]
        found += formatter.join([row for g in groups for row in g], of_rows, STARCODER2)
    return found, drops


def take_apart(example):
    """Return the repository's name and the pieces of each fragment, its ending put back."""
    pieces = list(example["pieces"])
    name = ""
    if pieces[0].control == STARCODER2.repository:
        name, pieces = pieces[1].text, pieces[2:]
    if pieces[0].control == FILE_SEP:
        pieces = pieces[1:]
    parts = [[]]
    for piece in pieces:
        if piece.control == FILE_SEP:
            assert piece.trained
            parts.append([])
        else:
            parts[-1].append(piece)
    return name, parts


@settings(deadline=None, max_examples=60)
@given(FILES, st.integers(32, 90), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 400))
def test_all_files_come_back_in_order_none_lost_or_doubled(files, block_size, rate, limit):
    records = [
        {
            **record(f"s:{number}", text=text),
            "meta": json.dumps({"repository": repository, "path": path}),
        }
        for number, (repository, path, text) in enumerate(files)
    ]
    order = sorted(records, key=find_place)

    examples, drops = joined(records, block_size, rate, limit)

    texts, names = {}, {}
    met = []
    for example in examples:
        name, parts = take_apart(example)
        ids = [example["record_id"], *(example["joined"] or ())]
        assert len(ids) == len(parts)
        for record_id, part in zip(ids, parts, strict=True):
            if not met or met[-1] != record_id:
                met.append(record_id)
            texts[record_id] = texts.get(record_id, "") + restore_text(part)
            names.setdefault(record_id, set()).add(name)
        assert len(encode_pieces(separating_tokenizer(), example["pieces"]).input_ids) <= block_size
    kept = [row for row in order if row["text"].strip()]
    assert met == [row["id"] for row in kept]
    assert texts == {row["id"]: row["text"] for row in kept}
    assert drops.counts.total() == len(records) - len(kept)
    for row in kept:
        assert names[row["id"]] <= {"", find_place(row).repository}


def test_separators_are_found_by_name_or_named_as_missing():
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())

    with pytest.raises(TemplateError, match=r"no '<repo_name>', '<file_sep>', which files of"):
        find_separators(tokenizer)
    tokenizer.add_special_tokens(["<repo_name>"])
    with pytest.raises(TemplateError, match=r"no '<file_sep>', which files of a repository"):
        find_separators(tokenizer)
    tokenizer.add_special_tokens(["<file_sep>"])
    assert find_separators(tokenizer) == STARCODER2
