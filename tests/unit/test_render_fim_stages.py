"""What the rendering stages make of code and dialogues in one recipe: rates, passes, twins."""

import math
from collections import Counter

import datasets
import pytest

from pipelines.errors import RecipeError
from pipelines.render.encode import load_tokenizer
from pipelines.render.fim import restore_text
from pipelines.render.pack import unpack
from pipelines.render.pieces import read_pieces
from tests.assets.rendering import CORPUS, read_stream, record, render_stages, rendering_recipe

SMALL = {"tokenization__block_size": 64, "model__config__n_positions": 64}
CODE = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]
CHAT = [
    record(
        f"c:{i}",
        messages=[
            {"role": "user", "content": f"What is {i}?", "train": False},
            {"role": "assistant", "content": f"A number, {i}.", "train": True},
        ],
    )
    for i in range(20)
]
SENTINELS = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def stage_rows(store, ref):
    found = {}
    for shard, path in store.shards(ref):
        found.setdefault(shard.split, []).extend(read_stream(path))
    return found


def texts_of(rows):
    """Return {record id: text} of the code among formatted rows, fragments joined."""
    texts = Counter()
    found = {}
    for row in rows:
        if row["record_id"].startswith("f:"):
            assert row["part"] == texts[row["record_id"]]
            texts[row["record_id"]] += 1
            text = restore_text(read_pieces(row["pieces"]))
            found[row["record_id"]] = found.get(row["record_id"], "") + text
    return found


def test_code_and_dialogues_mix_in_one_recipe_and_passes_differ_in_code_alone(tmp_path):
    recipe = rendering_recipe(
        template__name="starchat", fim__fim_rate=0.5, fim__fim_passes=3, **SMALL
    )
    split = {"train": CODE + CHAT, "validation": CODE[:1] + CHAT[:5], "test": CHAT[5:8]}

    store, refs = render_stages(tmp_path, recipe, split)
    rows = stage_rows(store, refs["format"])
    manifests = {name: store.manifest(refs[name]) for name in ("format", "tokenize", "pack")}

    passes = ["train", "train.1", "train.2"]
    twins = ["validation.none", "validation.psm", "validation.spm"]
    assert sorted(rows) == sorted([*passes, *twins, "validation", "test"])
    wanted = {row["id"]: row["text"] for row in CODE}
    assert all(texts_of(rows[name]) == wanted for name in passes)
    chats = [[r for r in rows[name] if r["record_id"].startswith("c:")] for name in passes]
    assert chats[0] == chats[1] == chats[2] != []
    assert {row["fim"] for row in chats[0]} == {"none"}
    drawn = [[row["pieces"] for row in rows[name]] for name in passes]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    for name, manifest in manifests.items():
        assert manifest.counts.rows_in == (
            32 if name == "format" else manifests["format"].counts.rows_out
        ), name
    packed = {shard.split for shard, _ in store.shards(refs["pack"])}
    assert packed == set(rows)
    assert set(manifests["pack"].report["token_report"]["splits"]) == set(rows)


def test_twins_hold_the_same_fragments_in_one_order_each_in_every_run(tmp_path):
    split = {"train": CODE, "validation": CODE[1:] + CHAT, "test": CHAT[:1]}
    found = []
    for number, seed in enumerate((1, 2)):
        recipe = rendering_recipe(
            template__name="starchat", fim__fim_rate=0.3, training__seed=seed, **SMALL
        )
        store, refs = render_stages(tmp_path / str(number), recipe, split, until="format")
        rows = stage_rows(store, refs["format"])
        found.append({name: rows[name] for name in rows if "." in name})

    assert found[0] == found[1]
    twins = found[0]
    for order in ("none", "psm", "spm"):
        rows = twins[f"validation.{order}"]
        assert {row["fim"] for row in rows} == {order}
        assert texts_of(rows) == {row["id"]: row["text"] for row in CODE[1:]}
    fragments = [
        [restore_text(read_pieces(row["pieces"])) for row in rows] for rows in twins.values()
    ]
    assert fragments[0] == fragments[1] == fragments[2]


def test_without_fim_there_are_neither_passes_nor_twins(tmp_path):
    recipe = rendering_recipe(fim__fim_rate=0, fim__fim_passes=4)

    store, refs = render_stages(
        tmp_path, recipe, {"train": CODE, "validation": CODE}, until="format"
    )

    assert set(stage_rows(store, refs["format"])) == {"train", "validation"}


def test_a_sources_own_rate_goes_before_the_recipes(tmp_path):
    lines = "".join(f"x{i} = {i}\n" for i in range(6))
    records = [
        {**record(f"{source}:{i}", text=lines), "source": source}
        for source in ("a", "b")
        for i in range(400)
    ]
    recipe = rendering_recipe(
        sources__0__id="b", fim__fim_rate=0.25, fim__source_rates={"b": 0.75}, **SMALL
    )

    store, refs = render_stages(tmp_path, recipe, {"train": records}, until="format")
    rows = stage_rows(store, refs["format"])["train"]

    for source, rate in (("a", 0.25), ("b", 0.75)):
        orders = [row["fim"] for row in rows if row["source"] == source]
        permuted = sum(order != "none" for order in orders)
        deviation = math.sqrt(len(orders) * rate * (1 - rate))
        assert len(orders) == 400
        assert abs(permuted - len(orders) * rate) <= 3 * deviation


def test_a_rate_for_no_source_of_the_recipe_is_an_error():
    with pytest.raises(RecipeError, match="fim.source_rates: no source 'scikit'"):
        rendering_recipe(fim__source_rates={"scikit": 0.5})


@pytest.mark.parametrize("variant", [1, 2])
@pytest.mark.parametrize("train_sentinels", [False, True])
def test_cuts_between_tokens_keep_the_tokens_of_the_whole_fragment(
    tmp_path, variant, train_sentinels
):
    recipe = rendering_recipe(
        fim__fim_rate=1.0, fim__level="token", fim__spm_variant=variant,
        fim__train_sentinels=train_sentinels, **SMALL,
    )  # fmt: skip

    store, refs = render_stages(tmp_path, recipe, {"train": CODE, "validation": CODE[:1]})
    tokenizer = load_tokenizer(store.path(refs["tokenizer"]))
    fragments = stage_rows(store, refs["format"])["train"]
    rows = [
        example
        for _, path in store.shards(refs["pack"], "train")
        for row in datasets.Dataset.from_file(str(path))
        for example in unpack(row)
    ]

    ids = {tokenizer.token_to_id(name): name for name in SENTINELS}
    wanted = sorted(
        tokenizer.encode(row["pieces"][0]["text"], add_special_tokens=False).ids
        for row in fragments
    )
    restored, orders = [], Counter()
    for _, tokens, labels in rows:
        parts, current = {name: [] for name in SENTINELS}, ""
        assert tokenizer.id_to_token(tokens[-1]) == "<|endoftext|>"
        orders[tuple(ids[token] for token in tokens if token in ids)] += 1
        for token, label in zip(tokens[:-1], labels[:-1], strict=True):
            if token in ids:
                current = ids[token]
                assert (label != -100) == train_sentinels
            else:
                parts[current].append(token)
                assert label == token
        prefix, middle, suffix = (parts[name] for name in SENTINELS)
        restored.append(prefix + middle + suffix)
    assert sorted(restored) == wanted
    prefix, middle, suffix = SENTINELS
    spm = (suffix, prefix, middle) if variant == 1 else (prefix, suffix, middle)
    assert set(orders) == {(prefix, suffix, middle), spm}
    assert all(len(tokens) <= 64 for _, tokens, _ in rows)
