"""What a file's columns hold is recognized from its first rows, or refused with what to do."""

import json

import pytest

from pipelines.errors import SourceError
from pipelines.recipe import Template
from pipelines.render.templates import get_template
from tests.assets.curation import write_files
from tests.assets.datasets import ALPACA, SEED_001, SEED_003, body, collect, dataset_source, lines


def read_rows(tmp_path, *rows, **keys):
    write_files(tmp_path, {"rows.jsonl": lines(*rows)})
    records, manifest = collect(tmp_path, dataset_source(tmp_path / "rows.jsonl", **keys))
    return records, manifest


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
ANSWERS = [{"text": "No", "pm_score": 1}, {"text": "Hello", "pm_score": 4}]
SYSTEM = ("system", "Be kind.", False)
USER, ANSWER = ("user", "Hi", False), ("assistant", "Hello", True)
PAIR = ("Hi", "Hello")
WITH_INPUT = ("Hi\n\n### Input:\na", "Hello")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, [USER, ANSWER]),
        ({"messages": json.dumps(TURNS)}, [USER, ANSWER]),
        ({"messages": [PARTS, TURNS[1]]}, [USER, ANSWER]),
        ({"conversations": SHARED}, [USER, ANSWER]),
        ({"system": "Be kind.", "conversations": SHARED}, [SYSTEM, USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Hello"}, PAIR),
        ({"prompt": "Hi", "response": "Hello"}, PAIR),
        ({"prompt": "Hi", "response ": "Hello"}, PAIR),
        ({"INSTRUCTION": "Hi", "RESPONSE": "Hello", "METADATA": {"tags": "a"}}, PAIR),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, PAIR),
        ({"instruction": "Hi", "input": None, "response": "Hello"}, PAIR),
        ({"instruction": "Hi", "input": "a", "response": "Hello"}, WITH_INPUT),
        ({"instruction": "Hi", "context": "a", "response": "Hello"}, WITH_INPUT),
        ({"instruction": "Hi", "output": "Hello", "text": "Below is ..."}, PAIR),
        ({"instruction": "Hi", "output": "Hello", "response": "Hello"}, PAIR),
        ({"question": "Hi", "answer": "Hello"}, PAIR),
        ({"question": "Hi", "response": "Hello"}, PAIR),
        ({"qid": 7, "question": "Hi", "response_j": "Hello", "response_k": "Go away"}, PAIR),
        ({"question": "Hi", "answers": ANSWERS}, PAIR),
        ({"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]}, PAIR),
        (
            {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"},
            [SYSTEM, USER, ANSWER],
        ),
        ({"content": "x = 1\n", "path": "a.py"}, "x = 1\n"),
        ({"text": "x = 1\n"}, "x = 1\n"),
        ({"code": "x = 1\n", "language": "python"}, "x = 1\n"),
    ],
)  # fmt: skip
def test_a_known_schema_is_detected(tmp_path, row, expected):
    records, manifest = read_rows(tmp_path, row)

    assert [body(record) for record in records] == [expected]
    assert (manifest.counts.rows_in, manifest.counts.used) == (1, 1)


def test_the_example_of_seed_001_is_read_from_a_file_as_it_stands(tmp_path):
    write_files(tmp_path, {"chat.json": SEED_001})

    [record], _ = collect(tmp_path, dataset_source(tmp_path / "chat.json"))

    roles = [(role, train) for role, _, train in body(record)]
    assert roles == [("user", False), ("assistant", True)] * 2
    assert body(record)[0][1] == "Is it possible to imagine a society without law?"


def test_the_example_of_seed_003_is_read_with_its_provenance(tmp_path):
    [record], _ = read_rows(tmp_path, SEED_003, revision="v1", repository="owner/name")

    page = "https://github.com/owner/name/blob/v1/rows.jsonl"
    assert record == {
        "id": "d:rows.jsonl:1",
        "group": "d:rows.jsonl:1",
        "source": "d",
        "revision": "v1",
        "url": page,
        "author": None,
        "license": "MIT",
        "created": None,
        "score": None,
        "messages": None,
        **SEED_003,
        "text": None,
        "meta": '{"file":"rows.jsonl","row":1}',
    }


def test_instruction_and_input_stay_apart(tmp_path):
    (with_input, without), _ = read_rows(tmp_path, *ALPACA)
    (joined, _), _ = read_rows(tmp_path, *ALPACA, input_separator="\n\n")

    assert body(with_input) == ("Add the numbers.\n\n### Input:\n1 and 2", "3")
    assert json.loads(with_input["meta"])["instruction_chars"] == len("Add the numbers.")
    assert body(without) == ("Name a prime.", "7")
    assert "instruction_chars" not in without["meta"]
    assert joined["prompt"] == "Add the numbers.\n\n1 and 2"


def test_the_alpaca_template_renders_both_variants_to_the_byte(tmp_path):
    records, _ = read_rows(tmp_path, *ALPACA)
    template = get_template(Template(name="alpaca"))

    with_input, without = (
        "".join(piece.text for piece in template.render_prompt(record)) for record in records
    )

    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    assert without == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a prime.\n\n### Response:"
    )


def test_pairs_of_one_question_stay_in_one_group(tmp_path):
    rows = [
        {"qid": 7, "question": "Hi", "response_j": text, "response_k": "no"} for text in ("a", "b")
    ]

    records, _ = read_rows(tmp_path, *rows)

    assert [(r["id"], r["group"]) for r in records] == [
        ("d:rows.jsonl:1", "d:7"),
        ("d:rows.jsonl:2", "d:7"),
    ]


def test_every_instance_of_a_task_is_a_record_of_the_task(tmp_path):
    task = {
        "id": "seed_task_9",
        "instruction": "Add.",
        "instances": [{"input": "1 1", "output": "2"}, {"input": "1 2", "output": "3"}],
    }

    records, manifest = read_rows(tmp_path, task)

    assert [(r["id"], r["completion"]) for r in records] == [
        ("d:rows.jsonl:seed_task_9", "2"),
        ("d:rows.jsonl:seed_task_9/1", "3"),
    ]
    assert {r["group"] for r in records} == {"d:rows.jsonl:seed_task_9"}
    assert (manifest.counts.rows_in, manifest.counts.rows_out, manifest.counts.used) == (1, 2, 1)


def test_provenance_columns_are_carried_row_by_row(tmp_path):
    row = {
        "question_id": 11,
        "id": 3,
        "question": "Hi",
        "answer": "Hello",
        "url": "https://a.example/q/11",
        "author": "Ada",
        "license": "cc-by-sa-4.0",
        "creation_date": 1_600_000_000,
        "score": 5,
    }

    records, _ = read_rows(tmp_path, row, {"question": "Ho", "answer": "Hello"} | {"id": 4})

    shown = ("id", "group", "url", "author", "license", "created", "score")
    assert [tuple(r[name] for name in shown) for r in records] == [
        ("d:rows.jsonl:3", "d:11", "https://a.example/q/11", "Ada", "CC-BY-SA-4.0",
         "2020-09-13T12:26:40+00:00", 5.0),
        ("d:rows.jsonl:4", "d:rows.jsonl:4", "rows.jsonl", None, "MIT", None, None),
    ]  # fmt: skip


def test_an_id_that_comes_twice_gets_its_row_number(tmp_path):
    rows = [{"id": f"n{n}", "prompt": f"p{n}", "completion": "c"} for n in range(300)]

    records, _ = read_rows(tmp_path, *rows, rows[0])

    assert records[-1]["id"] == "d:rows.jsonl:n0~301"
    assert len({record["id"] for record in records}) == 301


def test_columns_that_repeat_are_no_ids(tmp_path):
    rows = [{"id": "same", "prompt": f"p{n}", "completion": "c"} for n in range(2)]

    records, _ = read_rows(tmp_path, *rows)

    assert [record["id"] for record in records] == ["d:rows.jsonl:1", "d:rows.jsonl:2"]


def test_named_columns_win_over_detected_ones_and_reach_into_nested_ones(tmp_path):
    row = {"prompt": "no", "completion": "no", "ask": "Hi", "info": {"reply": "Hello", "n": 3}}
    columns = {"prompt": "ask", "completion": "info.reply", "score": "info.n"}

    [record], _ = read_rows(tmp_path, row, columns=columns)

    assert (body(record), record["score"]) == (PAIR, 3.0)


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        ({"prompt": "Hi"}, {}, "'prompt' is a prompt without a completion, so there is nothing to"),
        ({"a": "x", "b": "y"}, {}, "no known schema (columns: 'a', 'b'); looked for a dialogue"),
        (
            {"prompt": "Hi", "output": "1", "response": "2"}, {},
            "'response' or 'output'? Both are there and differ (columns: 'prompt', 'output'",
        ),
        (
            {"prompt": "a", "completion": "b", "query": "c", "output": "d"}, {},
            "'completion' or 'output'?",
        ),
        (
            {"problem": "a", "solution": "b", "instruction": "c", "output": "b"}, {},
            "'instruction + output' or 'problem + solution'?",
        ),
        ({"content": "a", "text": "b"}, {}, "say which with columns: {text: content}"),
        (
            {"prompt": "Hi", "response": "x"}, {"columns": {"completion": "response "}},
            "columns.completion names 'response ', which no row has, did you mean 'response'?",
        ),
        (
            {"message_id": "1", "parent_id": "2", "text": "Hi", "role": "prompter"}, {},
            "read them with type: oasst",
        ),
        ({"code": "x", "question": "Hi", "answer": "Ho"}, {}, "type: code-qa"),
        ({"prompt": 3, "completion": 4}, {}, "no known schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_decided_is_one_clear_error(tmp_path, row, keys, said):
    with pytest.raises(SourceError) as error:
        read_rows(tmp_path, row, **keys)

    assert str(error.value).startswith("source 'd': rows.jsonl: ")
    assert said in str(error.value)


def test_a_stray_row_of_another_layout_makes_no_file_ambiguous(tmp_path):
    rows = [{"prompt": f"Hi {n}", "completion": f"Hello {n}"} for n in range(15)]
    stray = {"question": "Who?", "answer": "Ada"}
    write_files(tmp_path / "in", {"rows.jsonl": lines(*rows[:9], stray, *rows[9:])})

    records, manifest = collect(tmp_path, dataset_source(tmp_path / "in"))

    assert [body(record)[0] for record in records] == [row["prompt"] for row in rows]
    assert manifest.counts.dropped == {"empty_prompt": 1}


def test_prompts_can_be_trained_on_as_text(tmp_path):
    [record], _ = read_rows(tmp_path, {"prompt": "Hi"}, columns={"text": "prompt"})

    assert body(record) == "Hi"


def test_rows_without_a_license_stop_the_run_unless_that_is_allowed(tmp_path):
    with pytest.raises(
        SourceError, match=r"no license found for row 1 of rows.jsonl; .*sources\.0"
    ):
        read_rows(tmp_path, SEED_003, license=None)

    [record], _ = read_rows(tmp_path, SEED_003, license=None, allow_unlicensed=True)
    assert record["license"] == "unknown"
