from pipelines.render.reports import (
    audit_mask,
    choose_audited,
    report_tokens,
    show_audit,
    show_tokens,
)
from tests.assets.rendering import CORPUS, record, render_stages, rendering_recipe, small_tokenizer

TOKENIZED = {
    "sources": {
        "a": {
            "train": {"examples": 2, "tokens": 30, "trained_tokens": 15, "characters": 90},
            "test": {"examples": 1, "tokens": 8, "trained_tokens": 8, "characters": 20},
        },
        "b": {"train": {"examples": 1, "tokens": 10, "trained_tokens": 10, "characters": 30}},
    },
    "dropped": {"too_long": 2},
    "format": {
        "splits": {
            "train": {
                "records": 5, "rows": 5, "cut_files": 1, "fragments": 3,
                "fim": {"none": 2, "psm": 1, "spm": 0}, "fim_did_not_fit": 0,
            },
        },
        "dropped": {"empty_text": 1},
    },
}  # fmt: skip


def make_report():
    lengths = {"train": [10, 20, 10], "validation": [], "test": [8]}
    return report_tokens(TOKENIZED, lengths, {"train": 2, "validation": 0, "test": 1}, 32)


def test_the_token_report_adds_up_over_sources_and_splits():
    report = make_report()

    assert report["splits"] == {
        "train": {
            "examples": 3, "tokens": 40, "trained_tokens": 25, "characters": 120,
            "trained_share": 0.625, "characters_per_token": 3.0, "rows": 2, "fill": 0.625,
            "lengths": [[16, 2], [32, 1]],
        },
        "validation": {
            "examples": 0, "tokens": 0, "trained_tokens": 0, "characters": 0,
            "trained_share": 0.0, "characters_per_token": 0.0, "rows": 0, "fill": 0.0,
            "lengths": [],
        },
        "test": {
            "examples": 1, "tokens": 8, "trained_tokens": 8, "characters": 20,
            "trained_share": 1.0, "characters_per_token": 2.5, "rows": 1, "fill": 0.25,
            "lengths": [[8, 1]],
        },
    }  # fmt: skip
    assert report["sources"]["b"] == {
        "train": {
            "examples": 1, "tokens": 10, "trained_tokens": 10, "characters": 30,
            "trained_share": 1.0, "characters_per_token": 3.0,
        }
    }  # fmt: skip
    assert report["dropped"] == {"empty_text": 1, "too_long": 2}


def test_the_token_report_reads_as_tables_and_a_histogram():
    lines = show_tokens(make_report()).split("\n")

    assert "| train | 3 | 40 | 62.5% | 3.00 | 2 | 62.50% |" in lines
    assert "| b | train | 1 | 10 | 100.0% | 3.00 |" in lines
    assert f"<=     16 {'#' * 40} 2" in lines
    assert f"<=     32 {'#' * 20}{' ' * 20} 1" in lines
    assert "Dropped: empty_text 1, too_long 2." in lines
    assert "Code in train: 1 files cut, 3 fragments, none 2, psm 1, spm 0." in lines


def test_the_token_report_says_how_many_dialogues_were_shortened():
    found = {"dialogues": 3, "rows": 5, "turns_kept": 6, "turns_dropped": 1}
    report = report_tokens({**TOKENIZED, "shortened": found}, {"train": [10]}, {"train": 1}, 32)

    assert report["shortened"] == found
    assert "Shortened: 3 dialogues to 5 rows, 6 answers kept, 1 left out." in show_tokens(report)
    assert "Shortened" not in show_tokens(make_report())


def test_the_audit_takes_one_short_example_of_each_source_and_order():
    ids = [f"r{i}" for i in range(8)]
    sources = ["a", "a", "a", "b", "b", "a", "a", "a"]
    orders = ["none", "psm", "none", "none", "none", "none", "none", "none"]
    lengths = [300, 400, 20, 500, 600, 30, 700, 900]

    chosen = choose_audited(ids, sources, orders, lengths)

    assert len(chosen) == len(set(chosen)) == 5
    assert chosen[0] in (2, 5)
    assert chosen[1] == 1
    assert chosen[2] in (3, 4)
    assert {2, 5} <= set(chosen)
    assert choose_audited(ids[:2], sources[:2], orders[:2], lengths[:2]) == [0, 1]


def test_the_audit_decodes_trained_and_untrained_parts():
    tokenizer = small_tokenizer()
    question, answer = tokenizer.encode("2 + 2?\n").ids, tokenizer.encode(" 4\nyes").ids
    end = [tokenizer.token_to_id("<|end|>")]

    audit = audit_mask(
        tokenizer, "r:1", question + answer + end, [-100] * len(question) + answer + end
    )

    assert audit == {
        "record_id": "r:1",
        "segments": [
            {"text": "2 + 2?\n", "trained": False},
            {"text": " 4\nyes<|end|>", "trained": True},
        ],
    }
    assert show_audit([audit]) == ("`r:1`\n\n~~~~~~diff\n  2 + 2?\n+  4\n+ yes<|end|>\n~~~~~~\n")


def test_the_dataset_carries_both_reports_and_their_numbers_are_its_own(tmp_path):
    code = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]
    pairs = [record(f"p:{i}", prompt=f"Say {i}.", completion=f"{i}") for i in range(9)]
    recipe = rendering_recipe(fim__fim_rate=0.5, template__train_on_prompt=False)

    store, refs = render_stages(tmp_path, recipe, {"train": code + pairs, "test": pairs[:2]})
    report = store.manifest(refs["pack"]).report
    train = report["token_report"]["splits"]["train"]
    shards = [shard for shard, _ in store.shards(refs["pack"], "train")]

    assert train["tokens"] == sum(shard.tokens for shard in shards)
    assert train["trained_tokens"] == sum(shard.trained_tokens for shard in shards)
    assert train["rows"] == sum(shard.rows for shard in shards)
    assert train["fill"] == round(train["tokens"] / (train["rows"] * 512), 4)
    texts = sum(len(r["text"]) for r in code)
    assert train["characters"] == texts + sum(len("Say 0.\n0") for _ in pairs)
    assert 3 <= len(report["mask_audit"]) <= 5
    prompts = [
        [(s["text"], s["trained"]) for s in example["segments"]]
        for example in report["mask_audit"]
        if example["record_id"].startswith("p:")
    ]
    assert prompts
    for segments in prompts:
        (prompt, untrained), (answer, trained) = segments
        number = answer.removesuffix("<|endoftext|>")
        assert (prompt, untrained, trained) == (f"Say {number}.\n", False, True)
