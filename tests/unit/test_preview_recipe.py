"""A recipe's preview: what is rendered, trained, shortened and left out, of a few records."""

import pytest

from pipelines.errors import StarloomError
from pipelines.preview_recipe import preview_recipe
from tests.assets.rendering import CORPUS, record, rendering_recipe
from tests.assets.template_cases import chat

TURNS = (("user", "Hi"), ("assistant", "Hello"))
LONG = "0123456789" * 4


def chat_recipe(**keys):
    return rendering_recipe(
        template__name="starchat", template__train_on_prompt=False, fim__fim_rate=0, **keys
    )


def test_the_page_marks_what_is_trained_and_shows_the_prompt():
    records = [record("d:1", messages=chat(*TURNS)["messages"])]

    page = preview_recipe(chat_recipe(), records)

    assert "template   starchat; trained: answers\n" in page
    assert "records    1, before filters and deduplication" in page
    assert "`d:1`\n\n~~~~~~diff\n  <|user|>\n  Hi<|end|>\n  <|assistant|>\n+ Hello<|end|>\n" in page
    assert "The prompt of `d:1` at inference, " in page
    assert " tokens; the answer ends at '<|end|>':\n" in page
    assert "~~~~~~\n<|user|>\nHi<|end|>\n<|assistant|>\n\n~~~~~~\n" in page
    assert "Left out" not in page


def test_what_is_shortened_and_left_out_is_counted_with_examples():
    records = [
        record("ok", messages=chat(*TURNS)["messages"]),
        record("long", messages=chat(*TURNS, ("user", "x"), ("assistant", LONG))["messages"]),
        record("odd", messages=chat(("assistant", "x"))["messages"]),
    ]
    keys = {"tokenization__block_size": 56, "tokenization__truncation": "keep-last-turns"}

    page = preview_recipe(chat_recipe(**keys), records)

    assert "Shortened: 1 dialogues to 1 rows, 1 answers kept, 1 left out." in page
    assert "- template:bad_alternation: odd: record 'odd': message 0 has role 'assistant'" in page


def test_code_is_shown_as_it_is_permuted_and_long_examples_in_part():
    records = [record(f"f:{i}", text=text) for i, text in enumerate(CORPUS)]

    page = preview_recipe(rendering_recipe(fim__fim_rate=1.0), records, limit=2)

    assert page.count("~~~~~~diff") == 2
    assert "<fim_prefix>" in page
    assert "trained: prompts and answers" in page


def test_where_nothing_is_left_the_page_says_why():
    page = preview_recipe(chat_recipe(), [record("x", messages=chat(("user", "Hi"))["messages"])])

    assert "no example is left to train on (dropped: {'nothing_trained': 1})" in page
    assert "- nothing_trained: x: none of" in page


def test_no_record_is_an_error():
    with pytest.raises(StarloomError, match="no record to preview"):
        preview_recipe(chat_recipe(), [])


def refuse_addresses(*_):
    raise OSError("Name or service not known")


def hub_recipe(**keys):
    return rendering_recipe(tokenizer={"name_or_path": "owner/gated"}, **keys)


def test_a_tokenizer_out_of_reach_is_stood_in_for_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", refuse_addresses)
    monkeypatch.setattr("urllib.request.getproxies", dict)

    page = preview_recipe(
        hub_recipe(fim__fim_rate=0), [record("a", prompt="x = 1", completion="y")]
    )

    assert " tokens, owner/gated\n" in page
    assert (
        "Shown with a tokenizer trained on these records: the recipe's is not on this machine, and "
        "the Hub cannot be reached.\n"
    ) in page
    assert "+ y<|endoftext|>" in page


def test_a_tokenizer_that_is_refused_is_stood_in_for_and_its_own_template_by_chatml(monkeypatch):
    def refuse(*_, **__):
        raise OSError("401")

    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    records = [record("a", prompt="x = 1", completion="y")]

    page = preview_recipe(hub_recipe(), records)

    assert "on these records: tokenizer 'owner/gated' at revision 'main' cannot be fetched" in page

    own = hub_recipe(template__name="model", template__train_on_prompt=False)
    page = preview_recipe(own, records)

    assert ", so its own template is shown as chatml.\n" in page
    assert "+ y<|im_end|>" in page
