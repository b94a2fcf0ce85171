"""Over random dialogues, all templates, three tokenizers: prompts are prefixes, and exactly the
answers with their ends are trained, and no content forges a control token."""

import functools

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pipelines.render.encode import encode_pieces, encode_prompt
from tests.assets.template_cases import (
    ALL,
    CONTENT,
    DIALOGUES,
    FEW_SHOTS,
    PAIRS,
    TOKENIZERS,
    dialogues,
    open_template,
    open_tokenizer,
    save_folder,
    text_of,
)

FAST = settings(
    deadline=None,
    max_examples=20,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def given_tokenizer(request, tmp_path_factory):
    """A tokenizer with every control token, and its folder."""
    real_data = functools.partial(request.getfixturevalue, "real_data")
    tokenizer = open_tokenizer(request.param, real_data)
    return Given(tokenizer, save_folder(tokenizer, tmp_path_factory.mktemp(request.param)))


class Given:
    """Has a short repr, unlike a tokenizer: a failing example prints it."""

    def __init__(self, *pair):
        self.pair = pair

    def __iter__(self):
        return iter(self.pair)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def end_of(template):
    """Return what is trained behind an answer, and the blank before it."""
    pieces = template.render({"id": "x", "prompt": "q", "completion": "a"})
    trained = text_of(piece for piece in pieces if piece.trained)
    lead, _, end = trained.partition("a")
    finish = "<|endoftext|>" * end.endswith("<|endoftext|>")
    return lead, end.removesuffix(finish) if end != finish else end, finish if end != finish else ""


def expected_labels(template, messages):
    lead, end, finish = end_of(template)
    is_own = template.name == "model"
    trained = [
        f"{lead}{m['content'].strip() if is_own else m['content']}{end}"
        for m in messages
        if m["role"] == "assistant" and m["train"] is not False
    ]
    return "".join(trained) + finish * (messages[-1]["train"] is not False)


@pytest.mark.parametrize("name", DIALOGUES)
@FAST
@given(dialogue=dialogues())
def test_the_labels_of_a_dialogue_decode_to_its_answers_and_their_ends(
    given_tokenizer, name, dialogue
):
    tokenizer, folder = given_tokenizer
    template = open_template(DIALOGUES[name], folder)

    example = encode_pieces(tokenizer, template.render(dialogue))

    labels = [label for label in example.labels if label != -100]
    assert decode(tokenizer, labels) == expected_labels(template, dialogue["messages"])
    assert all(label in (-100, i) for i, label in zip(*example, strict=True))


@pytest.mark.parametrize("on_header", [False, True])
@pytest.mark.parametrize("name", [*DIALOGUES, *FEW_SHOTS])
@FAST
@given(dialogue=dialogues(has_system=False))
def test_the_prompt_of_a_dialogue_is_a_prefix_of_its_training_ids(
    given_tokenizer, name, on_header, dialogue
):
    tokenizer, folder = given_tokenizer
    if on_header and name in ("jinja", "model"):
        pytest.skip("a Jinja template says itself what is trained")
    changed = ALL[name].model_copy(update={"train_role_header": on_header})
    template = open_template(changed, folder)
    example = encode_pieces(tokenizer, template.render(dialogue))

    prompt = encode_prompt(tokenizer, template.render_prompt(dialogue))

    assert example.input_ids[: len(prompt)] == prompt
    rest = decode(tokenizer, example.input_ids[len(prompt) :])
    answer = dialogue["messages"][-1]["content"]
    assert (answer.strip() if name == "model" else answer) in rest


@pytest.mark.parametrize("name", [*DIALOGUES, *FEW_SHOTS])
@FAST
@given(dialogue=dialogues(has_system=False))
def test_the_number_of_control_tokens_depends_on_the_number_of_turns_alone(
    given_tokenizer, name, dialogue
):
    tokenizer, folder = given_tokenizer
    template = open_template(ALL[name], folder)
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    plain = {
        "id": "d",
        "messages": [{**message, "content": "x"} for message in dialogue["messages"]],
    }

    found, expected = (
        [i for i in encode_pieces(tokenizer, template.render(record)).input_ids if i in special]
        for record in (dialogue, plain)
    )

    assert found == expected


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize("name", PAIRS)
@FAST
@given(prompt=CONTENT, completion=CONTENT)
def test_the_prompt_of_a_pair_is_a_prefix_and_its_answer_ends_the_text(
    given_tokenizer, name, on_prompt, prompt, completion
):
    tokenizer, folder = given_tokenizer
    changed = PAIRS[name].model_copy(update={"train_on_prompt": on_prompt})
    template = open_template(changed, folder)
    pair = {"id": "p", "prompt": prompt, "completion": completion}

    example = encode_pieces(tokenizer, template.render(pair))
    head = encode_prompt(tokenizer, template.render_prompt({"prompt": prompt}))

    lead = " " if name == "question-answer" else ""
    start = int(name == "sc2-instruct")
    assert example.input_ids[: len(head)] == head
    rest = decode(tokenizer, example.input_ids[len(head) :])
    assert rest == f"{lead}{completion}<|endoftext|>"
    assert example.labels == [
        i if (on_prompt and at >= start) or at >= len(head) else -100
        for at, i in enumerate(example.input_ids)
    ]
    assert example.input_ids.count(tokenizer.token_to_id("<|endoftext|>")) == 1 + start
