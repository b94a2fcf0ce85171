import pytest

from pipelines.errors import TemplateError
from pipelines.recipe import Template as Settings
from pipelines.render.pieces import Piece
from pipelines.render.templates import Unrenderable, control_tokens, get_template

PAIR = {"id": "p:1", "messages": None, "prompt": "Add two.", "completion": "def add(): ..."}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nAdd two.\n\n### Response:"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd two.\n\n### Input:\n1, 2\n\n### Response:"
)

KNOWN = "system, assistant, user"
MENDED = "; template.alternation: repair mends what it can"


def chat(*turns, record_id="c:1"):
    messages = [{"role": role, "content": text, "train": None} for role, text in turns]
    return {"id": record_id, "messages": messages, "prompt": None, "completion": None}


def text_of(pieces):
    return "".join(piece.text or piece.control for piece in pieces)


def trained_text(pieces):
    return [piece.text or piece.control for piece in pieces if piece.trained]


def template(name, **settings):
    return get_template(Settings(name=name, **settings))


@pytest.mark.parametrize(
    ("name", "record", "rendered", "trained"),
    [
        ("plain", PAIR, "Add two.\ndef add(): ...<|endoftext|>", "def add(): ..."),
        ("alpaca", PAIR, f"{ALPACA}def add(): ...<|endoftext|>", "def add(): ..."),
        (
            "alpaca",
            {**PAIR, "prompt": "Add two.\n\n### Input:\n1, 2"},
            f"{ALPACA_INPUT}def add(): ...<|endoftext|>",
            "def add(): ...",
        ),
        (
            "question-answer",
            PAIR,
            "Question: Add two.\n\nAnswer: def add(): ...<|endoftext|>",
            " def add(): ...",
        ),
    ],
)
def test_prompt_templates_render_the_seeds_bytes_and_train_the_answer(
    name, record, rendered, trained
):
    pieces = template(name).render(record)

    assert text_of(pieces) == rendered
    assert trained_text(pieces) == [trained, "<|endoftext|>"]
    assert pieces[-1] == Piece(control="<|endoftext|>", trained=True)


def test_train_on_prompt_puts_the_whole_document_into_the_loss():
    pieces = template("plain", train_on_prompt=True).render(PAIR)

    assert trained_text(pieces) == ["Add two.\n", "def add(): ...", "<|endoftext|>"]


def test_starchat_trains_answers_with_their_end_token_and_nothing_else():
    dialogue = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See"))

    pieces = template("starchat").render(dialogue)

    assert text_of(pieces) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\nSee<|end|>\n"
    )
    assert trained_text(pieces) == ["Hello", "<|end|>", "See", "<|end|>"]
    assert pieces[4:10] == [
        Piece(text="\n"),
        Piece(control="<|assistant|>"),
        Piece(text="\n"),
        Piece(text="Hello", trained=True),
        Piece(control="<|end|>", trained=True),
        Piece(text="\n"),
    ]


@pytest.mark.parametrize(
    ("system", "own", "rendered"),
    [
        (None, None, "<|user|>\nHi<|end|>\n"),
        ("", None, "<|system|>\n<|end|>\n<|user|>\nHi<|end|>\n"),
        ("Be kind.", None, "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n"),
        ("Be kind.", "Be brief.", "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n"),
    ],
)
def test_the_system_turn_is_the_dialogues_own_or_the_recipes_or_left_out(system, own, rendered):
    first = [("system", own)] if own else []
    dialogue = chat(*first, ("user", "Hi"), ("assistant", "Hello"))

    pieces = template("starchat", system=system).render(dialogue)

    assert text_of(pieces) == f"{rendered}<|assistant|>\nHello<|end|>\n"
    assert trained_text(pieces) == ["Hello", "<|end|>"]


def test_a_message_marked_as_not_to_be_trained_is_only_read():
    dialogue = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    dialogue["messages"][1]["train"] = False

    assert trained_text(template("starchat").render(dialogue)) == ["d", "<|end|>"]


def test_a_dialogue_that_ends_with_a_question_trains_nothing_after_the_last_answer():
    dialogue = chat(("user", "a"), ("assistant", "b"), ("user", "c"))

    pieces = template("starchat").render(dialogue)

    assert text_of(pieces).endswith("<|user|>\nc<|end|>\n")
    assert trained_text(pieces) == ["b", "<|end|>"]


def test_the_inference_prompt_ends_behind_the_assistants_header():
    dialogue = chat(("user", "a"), ("assistant", "b"), ("user", "c"))

    assert text_of(template("starchat").render_prompt(dialogue)).endswith(
        "<|user|>\nc<|end|>\n<|assistant|>\n"
    )
    assert text_of(template("starchat", system="").render_prompt({"prompt": "a"})) == (
        "<|system|>\n<|end|>\n<|user|>\na<|end|>\n<|assistant|>\n"
    )


def test_pairs_are_dialogues_of_two_turns_and_the_other_way_round():
    dialogue = chat(("user", PAIR["prompt"]), ("assistant", PAIR["completion"]))

    for name in ("starchat", "plain", "alpaca", "question-answer"):
        assert template(name).render(dialogue) == template(name).render(PAIR)


@pytest.mark.parametrize(
    ("turns", "why", "detail"),
    [
        ((), "no_messages", "no message to render"),
        ((("system", "x"),), "no_messages", "a system turn and nothing else"),
        (
            (("user", "a"), ("asistant", "b")),
            "unknown_role",
            f"message 1 has role 'asistant', did you mean 'assistant'? (known: {KNOWN})",
        ),
        ((("user", " \n"),), "empty_message", "message 0 (user) is empty"),
        ((("user", None),), "empty_message", "message 0 (user) is empty"),
        (
            (("assistant", "a"),),
            "bad_alternation",
            f"message 0 has role 'assistant', expected 'user'{MENDED}",
        ),
        (
            (("user", "a"), ("user", "b")),
            "bad_alternation",
            f"message 1 has role 'user', expected 'assistant'{MENDED}",
        ),
        (
            (("system", "x"), ("system", "y"), ("user", "a")),
            "bad_alternation",
            f"message 1 has role 'system', expected 'user'{MENDED}",
        ),
    ],
)
def test_a_bad_dialogue_is_refused_with_its_record_and_the_reason(turns, why, detail):
    for render in (template("starchat").render, template("starchat").render_prompt):
        with pytest.raises(Unrenderable) as error:
            render(chat(*turns))

        assert (error.value.why, str(error.value)) == (why, f"record 'c:1': {detail}")


@pytest.mark.parametrize("name", ["plain", "alpaca", "question-answer"])
@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({**PAIR, "prompt": " "}, "empty_prompt"),
        ({**PAIR, "prompt": None}, "empty_prompt"),
        ({**PAIR, "completion": ""}, "empty_completion"),
        ({**PAIR, "completion": None}, "empty_completion"),
        (chat(("user", "a"), ("assistant", "b"), ("user", "c")), "not_a_pair"),
        (chat(("system", "x"), ("user", "a"), ("assistant", "b")), "not_a_pair"),
    ],
)
def test_prompt_templates_refuse_what_is_not_a_full_pair(name, record, why):
    with pytest.raises(Unrenderable) as error:
        template(name).render(record)

    assert error.value.why == why


def test_a_system_text_without_a_system_turn_is_an_error():
    with pytest.raises(TemplateError, match="'plain' has no system turn; remove the key"):
        template("plain", system="Be kind.")


def test_a_template_names_the_control_tokens_it_renders_and_the_one_it_stops_at():
    assert control_tokens(template("starchat")) == (
        "<|system|>", "<|assistant|>", "<|user|>", "<|end|>",
    )  # fmt: skip
    assert control_tokens(template("alpaca")) == ("<|endoftext|>",)
    assert (template("starchat").stop, template("plain").stop) == ("<|end|>", "<|endoftext|>")
