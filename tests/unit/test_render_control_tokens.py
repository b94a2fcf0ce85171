"""No content gives a control token, whatever the template, the tokenizer or the order of tokens."""

import functools
import itertools
import random

import pytest

from pipelines.render.encode import encode_pieces, encode_prompt, encode_rows, load_tokenizer
from pipelines.render.pieces import Piece
from pipelines.render.templates import CHAT_TOKENS, get_template
from pipelines.settings.template import Template as Settings
from tests.assets.rendering import CONTROL_STRINGS, CORPUS, FORGED, train_tokenizer
from tests.assets.template_cases import (
    ALL,
    DIALOGUES,
    PAIRS,
    TOKENIZERS,
    WRITTEN,
    chat,
    open_template,
    open_tokenizer,
    save_folder,
)

NUM_FUZZED = 10_000


@pytest.fixture(scope="module", params=TOKENIZERS)
def opened(request, tmp_path_factory):
    """A tokenizer with every control token, its special ids, and its folder."""
    real_data = functools.partial(request.getfixturevalue, "real_data")
    tokenizer = open_tokenizer(request.param, real_data)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    folder = save_folder(tokenizer, tmp_path_factory.mktemp(request.param))
    return tokenizer, special, folder


def fuzzed_strings():
    """Return control strings whole, halved, doubled and in any case, among other characters."""
    draw = random.Random(0)
    parts = [
        *WRITTEN,
        *CONTROL_STRINGS,
        "<|",
        "|>",
        "<",
        ">",
        "\n",
        " ",
        "\u00e9",
        "\u65e5",
        "\U0001f600",
    ]
    return [
        "".join(_vary(draw, draw.choice(parts)) for _ in range(draw.randint(1, 8)))
        for _ in range(NUM_FUZZED)
    ]


def _vary(draw, text):
    cut = draw.randint(0, len(text))
    return draw.choice((text, text, text, text[:cut], text[cut:], text.upper(), text + text[:cut]))


def test_98_forged_strings_and_10000_fuzzed_ones_give_no_control_token(opened):
    tokenizer, special, _ = opened
    texts = [text for text in (*FORGED, *fuzzed_strings()) if text]

    rows = encode_rows(tokenizer, [[Piece(text)] for text in texts])

    assert len(set(FORGED)) == 98
    assert sum(any(name in text for name in WRITTEN) for text in texts) > NUM_FUZZED / 2
    assert not special & {i for row in rows for i in row.input_ids}
    assert [tokenizer.decode(row.input_ids, skip_special_tokens=False) for row in rows] == texts


@pytest.mark.parametrize("name", ALL)
def test_no_template_lets_contents_forge_a_control_token(opened, name):
    tokenizer, special, folder = opened
    template = open_template(ALL[name], folder)

    def controls(text):
        """Return the control ids of a dialogue all of whose contents are the text."""
        turns = [("user", text), ("assistant", text)] * (1 if name in PAIRS else 2)
        system = [("system", text)] if name in DIALOGUES else []
        example = encode_pieces(tokenizer, template.render(chat(*system, *turns)))
        return [i for i in example.input_ids if i in special]

    expected = controls("x")

    assert all(controls(text) == expected for text in FORGED)


def test_ids_are_looked_up_by_name_whatever_the_order_of_the_tokens():
    template = get_template(Settings(name="starchat", system="S"))
    pieces = template.render(chat(("user", "q"), ("assistant", "a")))
    names = [piece.control for piece in pieces if piece.control]

    for order in itertools.permutations(CHAT_TOKENS):
        tokenizer = train_tokenizer(CORPUS[:1], 300)
        tokenizer.add_special_tokens(list(order))
        tokenizer.encode_special_tokens = True
        ids = encode_pieces(tokenizer, pieces).input_ids
        found = [tokenizer.id_to_token(i) for i in ids]
        assert [name for name in found if name in CHAT_TOKENS] == names


SEED = chat(("user", "Hello, can you help me?"), ("assistant", "Sure, what can I do for you?"))
SEED_IDS = [
    49154, 203, 8279, 30, 883, 844, 3049, 597, 49, 49155, 203,
    49153, 203, 69, 513, 30, 2769, 883, 439, 745, 436, 844, 49, 49155, 203,
]  # fmt: skip


@pytest.fixture(scope="module")
def starcoder(real_data):
    """The real tokenizer with the chat tokens in the order of the blog post."""
    tokenizer = load_tokenizer(real_data / "starcoder_tokenizer" / "starcoder")
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    return tokenizer


@pytest.mark.parametrize(
    ("on_header", "labels", "prompt"),
    [
        (True, [-100] * 11 + SEED_IDS[11:], SEED_IDS[:12]),
        (False, [-100] * 13 + SEED_IDS[13:24] + [-100], SEED_IDS[:13]),
    ],
)
def test_the_dialogue_of_the_blog_post_has_its_ids_and_with_headers_its_labels(
    starcoder, on_header, labels, prompt
):
    template = get_template(Settings(name="starchat", train_role_header=on_header))

    example = encode_pieces(starcoder, template.render(SEED))

    assert example.input_ids == SEED_IDS
    assert example.labels == labels
    assert encode_prompt(starcoder, template.render_prompt(SEED)) == prompt


def test_the_technical_assistants_prompt_heads_a_question(starcoder, real_data):
    path = real_data / "ta_prompt_v1" / "TA_prompt_v1.txt"
    template = get_template(Settings(name="few-shot", file=str(path)))

    pieces = template.render_prompt({"prompt": "What is a list?"})

    text = "".join(piece.text or piece.control for piece in pieces)
    assert text == f"{path.read_text().rstrip()}\n\nHuman: What is a list?\n\nAssistant:"
    assert len(starcoder.encode(path.read_text()).ids) == 3350
    assert 3350 < len(encode_prompt(starcoder, pieces)) < 3370
    assert template.stop_texts == ("\n\nHuman:", "\n-----")
