import json

import pytest
from tokenizers import Tokenizer

from pipelines.errors import TemplateError
from pipelines.recipe import Template as Settings
from pipelines.render.encode import (
    control_ids,
    encode_pieces,
    encode_prompt,
    encode_rows,
    encode_shard,
    load_tokenizer,
)
from pipelines.render.format import FORMAT_SCHEMA
from pipelines.render.pieces import Piece
from pipelines.render.templates import CHAT_TOKENS, get_template
from tests.assets.rendering import (
    FORGED,
    read_examples,
    record,
    render_stages,
    rendering_recipe,
    small_tokenizer,
    write_pieces,
)


@pytest.fixture(scope="module")
def starcoder(real_data):
    """The real tokenizer with the chat tokens added in the order of the blog post."""
    tokenizer = load_tokenizer(real_data / "starcoder_tokenizer" / "starcoder")
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    return tokenizer


def special_ids(tokenizer):
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def test_the_dialogue_of_the_seed_has_exactly_its_ids_and_trains_the_answer_alone(starcoder):
    turns = [("user", "Hello, can you help me?"), ("assistant", "Sure, what can I do for you?")]
    dialogue = {"id": "seed", "messages": [{"role": r, "content": c} for r, c in turns]}
    template = get_template(Settings(name="starchat"))

    example = encode_pieces(starcoder, template.render(dialogue))

    assert example.input_ids == [
        49154, 203, 8279, 30, 883, 844, 3049, 597, 49, 49155, 203,
        49153, 203, 69, 513, 30, 2769, 883, 439, 745, 436, 844, 49, 49155, 203,
    ]  # fmt: skip
    assert example.labels == [-100] * 13 + example.input_ids[13:24] + [-100]
    assert encode_prompt(starcoder, template.render_prompt(dialogue)) == example.input_ids[:13]


def test_rows_that_write_filename_get_no_control_token(starcoder, real_data):
    rows = json.loads((real_data / "gpteacher_codegen" / "codegen-instruct.json").read_text())
    texts = [f"{row['instruction']}\n{row['input']}\n{row['response']}" for row in rows]
    forged = [text for text in texts if "<filename>" in text]

    assert (len(rows), len(forged)) == (4535, 5)
    assert control_ids_in(starcoder, forged) == (set(), forged)


def control_ids_in(tokenizer, texts):
    """Encode each text as content; return the control ids found, and the decoded texts."""
    ids = [row.input_ids for row in encode_rows(tokenizer, [[Piece(text)] for text in texts])]
    decoded = [tokenizer.decode(row, skip_special_tokens=False) for row in ids]
    return special_ids(tokenizer) & {i for row in ids for i in row}, decoded


def test_none_of_98_forged_control_strings_gives_a_control_token():
    assert len(set(FORGED)) == 98
    assert control_ids_in(small_tokenizer(), FORGED) == (set(), FORGED)


def test_none_of_98_forged_control_strings_gives_one_of_starcoders(starcoder):
    assert control_ids_in(starcoder, FORGED) == (set(), FORGED)


def test_each_piece_is_encoded_by_itself_and_labeled_by_its_mask():
    tokenizer = small_tokenizer()
    pieces = [
        Piece(control="<|user|>"),
        Piece("\n"),
        Piece("return"),
        Piece(control="<|end|>", trained=True),
        Piece("return", trained=True),
    ]

    example = encode_pieces(tokenizer, pieces)

    word = tokenizer.encode("return").ids
    user, end, newline = (tokenizer.token_to_id(t) for t in ("<|user|>", "<|end|>", "\u010a"))
    assert example.input_ids == [user, newline, *word, end, *word]
    assert example.labels == [-100, -100, *[-100] * len(word), end, *word]


def test_a_missing_control_token_is_named():
    with pytest.raises(TemplateError, match="no control token '<|im_start|>'; use the tokenizer"):
        control_ids(small_tokenizer(), ["<|im_start|>"])


def test_a_control_token_that_text_can_produce_is_refused():
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.add_tokens(["<|turn|>"])
    tokenizer.encode_special_tokens = True

    with pytest.raises(TemplateError, match="'<|turn|>' is an ordinary token of this tokenizer"):
        control_ids(tokenizer, ["<|turn|>"])


def test_an_unreadable_tokenizer_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")

    with pytest.raises(TemplateError, match=r"tokenizer.json: not a readable tokenizer .*; save"):
        load_tokenizer(tmp_path)


def test_rows_are_kept_or_dropped_with_their_reason(tmp_path):
    dialogue = [{"role": "user", "content": "only a question", "train": None}]
    records = [
        record("fits", prompt="Say a.", completion="a"),
        record("long", prompt="Say many.", completion="many " * 200),
        record("untrained", messages=dialogue),
    ]
    recipe = rendering_recipe(
        template__name="starchat",
        template__train_on_prompt=False,
        tokenization__block_size=64,
    )

    store, refs = render_stages(tmp_path, recipe, {"train": records}, until="tokenize")
    manifest = store.manifest(refs["tokenize"])
    ((shard, path),) = store.shards(refs["tokenize"])
    rows = read_examples(path)

    assert manifest.counts.dropped == {"too_long": 1, "nothing_trained": 1}
    assert (manifest.counts.rows_in, manifest.counts.used, manifest.counts.rows_out) == (3, 1, 1)
    samples = manifest.report["samples"]
    assert [s["id"] for s in samples["too_long"] + samples["nothing_trained"]] == [
        "long", "untrained",
    ]  # fmt: skip
    assert samples["too_long"][0]["detail"].endswith("tokens, block_size 64")
    assert [row["record_id"] for row in rows] == ["fits"]
    trained = [label for label in rows[0]["labels"] if label != -100]
    tokenizer = load_tokenizer(store.path(refs["tokenizer"]))
    assert tokenizer.decode(trained, skip_special_tokens=False) == "a<|end|>"
    assert (shard.tokens, shard.trained_tokens) == (len(rows[0]["input_ids"]), len(trained))


def test_a_row_that_trains_its_first_token_alone_is_dropped(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    row = {"source": "s", "part": 0, "fim": "none"}
    write_pieces(
        tmp_path / "pieces.arrow",
        [
            {**row, "record_id": "one", "pieces": [Piece("x", None, True)._asdict()]},
            {**row, "record_id": "two", "pieces": [Piece("x\n", None, True)._asdict()]},
        ],
        FORMAT_SCHEMA,
    )

    outcome = encode_shard(
        [tmp_path / "pieces.arrow"],
        tmp_path / "examples.arrow",
        {"tokenizer": str(tmp_path), "fast": True, "block_size": 32, "token_fim": None},
    )

    assert outcome.rejects == (
        {"id": "one", "reason": "nothing_trained", "detail": "none of 1 tokens is predicted"},
    )
    assert [row["record_id"] for row in read_examples(tmp_path / "examples.arrow")] == ["two"]
