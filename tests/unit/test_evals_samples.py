"""Sample prompts: chosen by id alone, rendered by the template, never longer than the context."""

import hashlib

import pytest
import torch

from pipelines.evals.samples import choose_prompts, complete_prompts
from pipelines.records import new_record, write_rows
from pipelines.render.encode import load_tokenizer
from pipelines.training.models import build_model
from tests.assets.finished_runs import CONTEXT, make_recipe_of_pairs
from tests.assets.training_runs import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def pair(name, prompt="count", completion="one two", **fields):
    source = {"group": name, "source": "toy", "url": f"https://example.org/{name}"}
    return new_record(id=name, **source, prompt=prompt, completion=completion, **fields)


def file(name, text):
    return new_record(id=name, group=name, source="toy", text=text)


def dialogue(name, *turns):
    roles = ("user", "assistant")
    messages = [
        {"role": roles[i % 2], "content": text, "train": True} for i, text in enumerate(turns)
    ]
    return new_record(id=name, group=name, source="toy", messages=messages)


def choose(tmp_path, tokenizer, rows, **overrides):
    """Write the rows as two shards and return the chosen prompts."""
    for number, part in enumerate((rows[::2], rows[1::2])):
        write_rows(tmp_path / f"test-{number:05d}.parquet", part)
    recipe = make_recipe_of_pairs(**overrides)
    shards = sorted(tmp_path.glob("*.parquet"))
    return choose_prompts(shards, recipe, tokenizer, context=CONTEXT)


def by_hash(rows):
    return sorted((r["id"] for r in rows), key=lambda i: hashlib.sha256(i.encode()).hexdigest())


def test_the_choice_depends_on_ids_alone(tmp_path, tokenizer):
    rows = [pair(f"toy:{i}") for i in range(20)]
    (tmp_path / "forward").mkdir()
    (tmp_path / "backward").mkdir()

    forward = choose(tmp_path / "forward", tokenizer, rows, evaluation__num_samples=3)
    backward = choose(tmp_path / "backward", tokenizer, rows[::-1], evaluation__num_samples=3)

    assert [p.record["id"] for p in forward] == by_hash(rows)[:3]
    assert [p.record["id"] for p in backward] == by_hash(rows)[:3]


def test_a_prompt_that_leaves_no_room_for_its_completion_is_passed_over(tmp_path, tokenizer):
    room = CONTEXT - 12  # the template adds a newline
    rows = [pair("long", prompt="x" * room), pair("fits", prompt="x" * (room - 1))]

    assert [p.record["id"] for p in choose(tmp_path, tokenizer, rows)] == ["fits"]


def test_half_of_the_samples_continue_files_where_there_are_some(tmp_path, tokenizer):
    code = "\n" * 19 + "x\n" + "    value = 12\ny = 3\n"
    files = [file("code", code), file("short", "x = 1\n"), file("blank", "\n" * 30)]

    (tmp_path / "code").mkdir()
    (tmp_path / "both").mkdir()
    alone = choose(tmp_path / "code", tokenizer, files)
    rows = [*files, *(pair(f"pair {i}") for i in range(5))]
    among = choose(tmp_path / "both", tokenizer, rows, evaluation__num_samples=3)

    assert [p.record["id"] for p in among] == [*by_hash(rows[3:])[:2], "code"]
    assert [p.record["id"] for p in alone] == ["code"]
    assert alone[0].reference == " = 12\ny = 3\n"
    assert tokenizer.decode(alone[0].ids) + alone[0].reference == code


def test_the_last_answer_of_a_dialogue_is_the_reference_and_not_in_the_prompt(tmp_path, tokenizer):
    rows = [dialogue("one", "hi", "hello"), dialogue("open", "hi"), dialogue("empty", "hi", "")]
    (prompt,) = choose(tmp_path, tokenizer, rows)

    assert (prompt.record["id"], prompt.reference) == ("one", "hello")
    assert tokenizer.decode(prompt.ids) == "hi\n"


def test_a_split_without_prompts_gives_no_samples(tmp_path, tokenizer):
    assert choose(tmp_path, tokenizer, [file("short", "x")]) == []


def test_samples_are_greedy_stop_at_the_end_token_and_repeat(tmp_path, folder, tokenizer):
    rows = [pair(f"toy:{i}", prompt=f"count {i}", license="MIT") for i in range(4)]
    prompts = choose(tmp_path, tokenizer, rows)
    model = build_model(make_recipe_of_pairs(), folder).eval()

    first = complete_prompts(model, tokenizer, prompts, max_new_tokens=5)
    torch.manual_seed(99)
    again = complete_prompts(model, tokenizer, prompts, max_new_tokens=5)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[0])  # argmax: end of text
    ended = complete_prompts(model, tokenizer, prompts, max_new_tokens=5)

    assert first == again
    assert [s["stopped"] for s in first] == [False, False]
    names = by_hash(rows)[:2]
    assert [(s["completion"], s["stopped"]) for s in ended] == [("", True)] * 2
    assert ended[0] == {
        "record_id": names[0],
        "url": f"https://example.org/{names[0]}",
        "license": "MIT",
        "prompt": f"count {names[0][-1]}\n",
        "reference": "one two",
        "completion": "",
        "stopped": True,
    }
