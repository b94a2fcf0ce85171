"""Over random dialogues: prompts are prefixes, and exactly the answers are trained."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.recipe import Template as Settings
from pipelines.render.encode import encode_pieces, encode_prompt
from pipelines.render.templates import CHAT_TOKENS, get_template
from tests.assets.rendering import small_tokenizer

FORGED = st.sampled_from(
    [*CHAT_TOKENS, "<|endoftext|>", "\n", " ", "\u00e9", "\u2028", "### Response:"]
)
TEXT = st.lists(st.text(max_size=12) | FORGED, min_size=1, max_size=5).map("".join)
CONTENT = TEXT.filter(str.strip)


@st.composite
def dialogues(draw):
    """A dialogue that ends with an answer, some of its messages marked as not to be trained."""
    turns = draw(st.integers(1, 4))
    system = (
        [{"role": "system", "content": draw(TEXT), "train": None}] if draw(st.booleans()) else []
    )
    messages = [
        {
            "role": role,
            "content": draw(CONTENT),
            "train": draw(st.sampled_from([None, True, False])),
        }
        for _ in range(turns)
        for role in ("user", "assistant")
    ]
    return {"id": "d", "messages": system + messages}


def decode(ids):
    return small_tokenizer().decode(ids, skip_special_tokens=False)


@settings(deadline=None)
@given(dialogues(), st.none() | st.text(max_size=9), st.booleans())
def test_the_prompt_of_a_dialogue_is_a_prefix_of_its_training_ids(dialogue, system, on_prompt):
    template = get_template(Settings(name="starchat", system=system, train_on_prompt=on_prompt))
    example = encode_pieces(small_tokenizer(), template.render(dialogue))

    prompt = encode_prompt(small_tokenizer(), template.render_prompt(dialogue))

    answer = dialogue["messages"][-1]["content"]
    assert example.input_ids[: len(prompt)] == prompt
    assert decode(example.input_ids[len(prompt) :]) == f"{answer}<|end|>\n"


@settings(deadline=None)
@given(dialogues(), st.none() | st.text(max_size=9))
def test_the_labels_of_a_dialogue_decode_to_its_answers_and_end_tokens(dialogue, system):
    template = get_template(Settings(name="starchat", system=system))

    example = encode_pieces(small_tokenizer(), template.render(dialogue))

    answers = [
        f"{message['content']}<|end|>"
        for message in dialogue["messages"]
        if message["role"] == "assistant" and message["train"] is not False
    ]
    assert decode([label for label in example.labels if label != -100]) == "".join(answers)
    assert all(label in (-100, i) for i, label in zip(*example, strict=True))


@settings(deadline=None)
@given(dialogues(), st.none() | st.text(max_size=9))
def test_the_number_of_control_tokens_depends_on_the_number_of_turns_alone(dialogue, system):
    tokenizer = small_tokenizer()
    template = get_template(Settings(name="starchat", system=system))
    ids = encode_pieces(tokenizer, template.render(dialogue)).input_ids
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    has_own_system = dialogue["messages"][0]["role"] == "system"
    turns = len(dialogue["messages"]) + (system is not None and not has_own_system)

    assert sum(i in special for i in ids) == 2 * turns


@settings(deadline=None)
@given(CONTENT, CONTENT, st.sampled_from(["plain", "alpaca", "question-answer"]), st.booleans())
def test_the_prompt_of_a_pair_is_a_prefix_and_its_answer_ends_the_text(
    prompt, completion, name, on_prompt
):
    tokenizer = small_tokenizer()
    template = get_template(Settings(name=name, train_on_prompt=on_prompt))
    pair = {"id": "p", "prompt": prompt, "completion": completion}

    example = encode_pieces(tokenizer, template.render(pair))
    head = encode_prompt(tokenizer, template.render_prompt({"prompt": prompt}))

    lead = " " if name == "question-answer" else ""
    assert example.input_ids[: len(head)] == head
    assert decode(example.input_ids[len(head) :]) == f"{lead}{completion}<|endoftext|>"
    assert example.labels == [
        i if on_prompt or at >= len(head) else -100 for at, i in enumerate(example.input_ids)
    ]
    assert example.input_ids.count(0) == 1
