import itertools

import pytest

from pipelines.render import fragments, pair_columns
from pipelines.render.encode import encode_pieces, load_tokenizer
from pipelines.render.fim import Rules, restore_text
from pipelines.render.fragments import File, Splitter, cut_text
from pipelines.render.pieces import read_pieces
from pipelines.render.prompt_templates import INPUT_HEADER
from tests.assets.rendering import (
    CORPUS,
    read_stream,
    record,
    render_stages,
    rendering_recipe,
    small_splitter,
    small_tokenizer,
)

LEFT = Rules(0.0)
SMALL = {"tokenization__block_size": 64, "model__config__n_positions": 64}


def formatted(tmp_path, recipe, splits):
    store, refs = render_stages(tmp_path, recipe, splits, until="format")
    rows = {
        split: [row for _, path in store.shards(refs["format"], split) for row in read_stream(path)]
        for split in splits
    }
    return rows, store.manifest(refs["format"]), load_tokenizer(store.path(refs["tokenizer"]))


def test_files_longer_than_a_block_are_cut_at_line_ends_and_nothing_is_lost(tmp_path):
    records = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]
    recipe = rendering_recipe(fim__fim_rate=0, tokenization__block_size=128)

    rows, manifest, tokenizer = formatted(tmp_path, recipe, {"train": records})
    by_file = {
        r["id"]: [row for row in rows["train"] if row["record_id"] == r["id"]] for r in records
    }

    for source in records:
        made = by_file[source["id"]]
        texts = [restore_text(read_pieces(row["pieces"])) for row in made]
        ends = [row["pieces"][-1]["control"] == "<|endoftext|>" for row in made]
        assert "".join(texts) == source["text"]
        assert all(text.endswith("\n") for text in texts)
        assert [row["part"] for row in made] == list(range(len(made)))
        assert ends == [False] * (len(made) - 1) + [True]
    sizes = [
        len(encode_pieces(tokenizer, read_pieces(r["pieces"])).input_ids) for r in rows["train"]
    ]
    assert max(sizes) <= 128
    assert manifest.report["splits"]["train"] == {
        "records": 3,
        "rows": len(sizes),
        "cut_files": 3,
        "fragments": len(sizes),
        "fim": {"none": len(sizes), "psm": 0, "spm": 0},
        "fim_did_not_fit": 0,
    }


def test_a_line_longer_than_a_block_is_cut_between_characters():
    text = "data = '" + "caf\u00e9\U0001f600\u65e5" * 60 + "'\nx = 1\n"
    tokenizer = small_tokenizer()

    (found,) = small_splitter(32).split([File("f", text, LEFT)])

    assert "".join(fragment.text for fragment in found) == text
    assert max(len(encode_pieces(tokenizer, f.pieces).input_ids) for f in found) <= 32
    assert found[-1].text.endswith("x = 1\n")


def test_the_tokens_of_one_character_stay_together():
    stops = [1, 2, 3, 3, 3, 4]

    assert cut_text("ab\U0001f600c", stops, lambda _: 3) == ["ab", "\U0001f600", "c"]
    assert cut_text("ab\U0001f600c", stops, lambda _: 5) == ["ab\U0001f600", "c"]


def test_a_fragment_that_encodes_to_more_than_inside_its_file_is_cut_smaller(monkeypatch):
    tokenizer = small_tokenizer()

    count_tokens = Splitter.count_tokens
    # As if every row took 13 tokens more than it does.
    monkeypatch.setattr(
        Splitter, "count_tokens", lambda self, rows: [n + 13 for n in count_tokens(self, rows)]
    )
    (found,) = small_splitter(64).split([File("f", CORPUS[0], LEFT)])

    assert "".join(fragment.text for fragment in found) == CORPUS[0]
    assert max(len(encode_pieces(tokenizer, f.pieces).input_ids) for f in found) <= 64 - 13

    monkeypatch.setattr(Splitter, "count_tokens", lambda self, rows: [99 for _ in rows])
    assert small_splitter(64).split([File("f", CORPUS[0], LEFT)]) == [[]]


def test_short_files_stay_whole_and_the_order_is_kept():
    files = [("a", "a = 1\n"), ("long", CORPUS[0]), ("empty", ""), ("b", "b = 2\n")]

    groups = small_splitter(64).split([File(name, text, LEFT) for name, text in files])

    assert ["".join(f.text for f in group) for group in groups] == [text for _, text in files]
    assert [len(group) == 1 for group in groups] == [True, False, True, True]
    assert [group[-1].ends for group in groups] == [True] * 4


def test_only_training_code_is_permuted_and_every_fragment_fits(tmp_path):
    code = {
        split: [record(f"{split}:{i}", text=text) for i, text in enumerate(CORPUS)]
        for split in ("train", "validation", "test")
    }
    recipe = rendering_recipe(fim__fim_rate=1.0, fim__fim_spm_rate=0.5, **SMALL)

    rows, manifest, tokenizer = formatted(tmp_path, recipe, code)

    for split, made in rows.items():
        orders = {row["fim"] for row in made}
        assert orders == ({"psm", "spm"} if split == "train" else {"none"})
        assert manifest.report["splits"][split]["fim"] == {
            order: sum(row["fim"] == order for row in made) for order in ("none", "psm", "spm")
        }
        for row in made:
            pieces = read_pieces(row["pieces"])
            assert len(encode_pieces(tokenizer, pieces).input_ids) <= 64
            assert all(p.trained for p in pieces if p.text or p.control == "<|endoftext|>")
            assert not any(p.trained for p in pieces if (p.control or "").startswith("<fim"))
        for source in code[split]:
            parts = [r for r in made if r["record_id"] == source["id"]]
            assert "".join(restore_text(read_pieces(r["pieces"])) for r in parts) == source["text"]


def test_a_fragment_that_no_longer_fits_when_permuted_stays_left_to_right(tmp_path, monkeypatch):
    monkeypatch.setattr(fragments, "FIM_MARGIN", -3)
    records = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]

    rows, manifest, tokenizer = formatted(
        tmp_path, rendering_recipe(fim__fim_rate=1.0, **SMALL), {"train": records}
    )
    report = manifest.report["splits"]["train"]

    assert report["fim_did_not_fit"] == report["fim"]["none"] > 0
    sizes = [
        len(encode_pieces(tokenizer, read_pieces(r["pieces"])).input_ids) for r in rows["train"]
    ]
    assert max(sizes) <= 64


def test_what_cannot_be_rendered_is_dropped_with_its_reason_and_the_order_is_kept(tmp_path):
    records = [
        record("a", text="x = 1\n"),
        record("blank", text=" \n\t\n"),
        record("b", prompt="Say b.", completion="b"),
        record("silent", prompt="Say nothing.", completion=" "),
        record("nothing"),
        record("c", text="y = 2\n"),
    ]

    rows, manifest, _ = formatted(tmp_path, rendering_recipe(fim__fim_rate=0), {"train": records})

    assert [row["record_id"] for row in rows["train"]] == ["a", "b", "c"]
    assert manifest.counts.dropped == {
        "empty_text": 1, "template:empty_completion": 1, "template:empty_prompt": 1,
    }  # fmt: skip
    assert (manifest.counts.rows_in, manifest.counts.used) == (6, 3)
    assert manifest.report["samples"]["template:empty_completion"] == [
        {
            "id": "silent",
            "reason": "template:empty_completion",
            "detail": "record 'silent': the completion is empty",
        }
    ]


def test_two_records_with_one_id_are_both_rendered_once(tmp_path):
    records = [record("same", text="x = 1\n"), record("same", text="y = 2\n")]

    rows, _, _ = formatted(tmp_path, rendering_recipe(fim__fim_rate=0), {"train": records})

    assert [row["pieces"][0]["text"] for row in rows["train"]] == ["x = 1\n", "y = 2\n"]


@pytest.mark.parametrize("name", ["plain", "alpaca", "question-answer", "sc2-instruct"])
@pytest.mark.parametrize("truncation", ["drop", "split-windows"])
def test_pairs_are_rendered_as_columns_as_they_are_one_by_one(
    tmp_path, monkeypatch, name, truncation
):
    texts = ["a", "\u65e5", " \n", "", None, f"a{INPUT_HEADER}b", "<|endoftext|>", "\x1c", "x" * 3]
    records = [
        record(f"r:{i}", prompt=prompt, completion=completion)
        for i, (prompt, completion) in enumerate(itertools.product(texts, texts))
    ]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records[5:5] = [record("m", messages=turns), record("c", text="x = 1\n" * 200)]
    recipe = rendering_recipe(template__name=name, tokenization__truncation=truncation)

    columns = formatted(tmp_path / "columns", recipe, {"train": records})
    monkeypatch.setattr(pair_columns, "VISIBLE", "[^\\s\\S]")
    one_by_one = formatted(tmp_path / "rows", recipe, {"train": records})

    assert columns[0] == one_by_one[0]
    assert columns[1].counts == one_by_one[1].counts
    assert {"m", "c", "r:0"} < {row["record_id"] for row in columns[0]["train"]}
