"""How turns are written down, and a user's own template in YAML."""

import pytest

from pipelines.errors import TemplateError
from pipelines.render.pieces import Piece
from pipelines.render.templates import get_template
from pipelines.render.turn_formats import FORMATS, TurnFormat, parse_turn, read_format
from pipelines.settings.template import Template as Settings
from tests.assets.template_cases import PIECES, chat, text_of


def test_a_turn_is_a_header_a_content_an_end_and_what_is_never_trained():
    turn = parse_turn("<|user|>bot\n{content} <|end|>\n", ["<|user|>", "<|end|>"])

    assert turn == TurnFormat(
        (Piece(control="<|user|>"), Piece("bot"), Piece("\n")),
        "",
        (Piece(" "), Piece(control="<|end|>")),
        (Piece("\n"),),
    )


def test_a_newline_that_ends_a_header_is_a_piece_of_its_own():
    turn = parse_turn("[B]bot\n{content}\n", ["[B]"])

    assert turn.header == (Piece(control="[B]"), Piece("bot"), Piece("\n"))
    assert (turn.lead, turn.end, turn.after) == ("", (Piece("\n"),), ())


def test_blanks_right_before_a_content_go_with_it():
    turn = parse_turn("Bot:  {content}\n", [])

    assert (turn.header, turn.lead) == ((Piece("Bot:"),), "  ")


def test_the_longest_control_token_counts_where_one_begins_another():
    turn = parse_turn("<a><a><b>{content}<a>", ["<a>", "<a><b>"])

    assert turn.header == (Piece(control="<a>"), Piece(control="<a><b>"))


def test_the_tokens_and_the_end_of_each_format():
    assert {name: each.control_tokens for name, each in FORMATS.items()} == {
        "starchat": ("<|system|>", "<|assistant|>", "<|user|>", "<|end|>"),
        "chatml": ("<|im_start|>", "<|im_end|>"),
        "zephyr": ("<|system|>", "<|assistant|>", "<|user|>", "<|endoftext|>"),
        "oasst": ("<|system|>", "<|assistant|>", "<|prompter|>", "<|endoftext|>"),
        "human-assistant": ("<|endoftext|>",),
    }
    assert {name: (each.stop, each.stop_texts) for name, each in FORMATS.items()} == {
        "starchat": ("<|end|>", ()),
        "chatml": ("<|im_end|>", ()),
        "zephyr": ("<|endoftext|>", ()),
        "oasst": ("<|endoftext|>", ()),
        "human-assistant": ("<|endoftext|>", ("\nHuman:",)),
    }


def test_a_template_of_the_users_own_is_written_as_turns():
    settings = Settings(name="file", file="mine.yaml", file_text=PIECES)
    template = get_template(settings)

    pieces = template.render(chat(("system", "s"), ("user", "q"), ("assistant", "a")))

    assert text_of(pieces) == "[/]Rules: s\n[USER] q[/][BOT]\na[/]\n<|endoftext|>"
    assert [p.text or p.control for p in pieces if p.trained] == ["a", "[/]", "<|endoftext|>"]
    assert template.control_tokens == ("[USER]", "[BOT]", "[/]", "<|endoftext|>")
    assert text_of(template.render_prompt({"prompt": "q"})) == "[/][USER] q[/][BOT]\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "mine.yaml: not valid YAML: "),
        ("text", "mine.yaml: expected the keys control_tokens, start, system"),
        ("user: x\nassistent: y", "mine.yaml: assistent: unknown key, did you mean 'assistant'?"),
        ("user: '{content}'", "mine.yaml: assistant: required, a turn such as '<|assistant|>{con"),
        ("user: x\nassistant: y", "mine.yaml: 'x' holds {content} 0 times, expected once"),
        ("user: 1\nassistant: y", "mine.yaml: user: expected a text, got 1"),
        (
            "user: x\nassistant: y\nstop_texts: z",
            "mine.yaml: stop_texts: expected a list of texts, got 'z'",
        ),
        (
            "user: x\nassistant: y\ncontrol_tokens: ['']",
            "mine.yaml: control_tokens: expected a list of texts, got ['']",
        ),
    ],
)
def test_a_template_file_that_is_none_is_refused_by_name(text, problem):
    with pytest.raises(TemplateError) as error:
        read_format(text, "mine.yaml")

    assert str(error.value).startswith(problem)
