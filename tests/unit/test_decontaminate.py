"""Texts of benchmarks are found in records, however spaced, and clean code is left alone."""

import csv
import gzip
import json
import os
import random
import re
import sysconfig
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.curate import decontaminate
from pipelines.curate.benchmarks import read_items
from pipelines.errors import SourceError
from pipelines.manifest import Counts
from pipelines.plan import Stage, build_stage
from pipelines.store import Store
from tests.assets.curation import curation_recipe, record, rows_of, store_stage

STAGE = Stage("decontaminate", "pipelines.curate.decontaminate", ("dedup",))
REAL_DATA = os.environ.get("STARLOOM_REAL_DATA")

PROMPT = '''\
def largest_gap(numbers):
    """Return the largest difference between two neighbors of a list of numbers.

    >>> largest_gap([1, 4, 6, 20])
    14
    """
'''
SOLUTION = """\
    pairs = zip(numbers, numbers[1:])
    return max((abs(right - left) for left, right in pairs), default=0)
"""
PROBLEM = {
    "task_id": "Own/0",
    "prompt": PROMPT,
    "canonical_solution": SOLUTION,
    "entry_point": "largest_gap",
}
# As MBPP publishes it: CRLF, tabs, tests in a list.
CRLF_PROBLEM = {
    "task_id": 11,
    "text": "Write a python function to remove first and last occurrence of a given character.",
    "code": "def remove_Occ(s,ch): \r\n\tfor i in range(len(s)): \r\n\t\tif (s[i] == ch): \r\n"
    "\t\t\ts = s[0 : i] + s[i + 1:] \r\n\t\t\tbreak\r\n\treturn s ",
    "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abc","a")=="bc"'],
}


def lists(tmp_path, *problems):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def run(tmp_path, against, *shards, workers=1, **settings):
    names = [str(path) for path in against]
    recipe = curation_recipe(curation={"decontaminate": {"against": names, **settings}})
    store = Store(tmp_path / "store", workers=workers)
    refs = {"dedup": store_stage(store, "dedup", *shards)}
    ref = build_stage(STAGE, recipe, refs, store)
    hits = pq.read_table(store.path(ref) / "hits.parquet").to_pylist()
    return [row["id"] for row in rows_of(store, ref)], store.manifest(ref), hits


def clean_texts(count, smallest=300):
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in paths)
    return list(islice((text[:20_000] for text in texts if len(text) >= smallest), count))


SPACED = {
    "verbatim": lambda text: text,
    "crlf": lambda text: text.replace("\n", "\r\n"),
    "tabs": lambda text: text.replace("    ", "\t"),
    "one line": lambda text: " ".join(text.split()),
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "indented": lambda text: "        " + text.replace("\n", "\n        "),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "wide spaces": lambda text: (
        "\ufeff" + text.replace(" ", "\u2003\u200b").replace("\n", "\u2028")
    ),
    "upper case": lambda text: text.upper(),
    "embedded": lambda text: f"{clean_texts(1)[0]}\n{text}\n{clean_texts(2)[1]}",
}


@pytest.mark.parametrize("change", SPACED)
@pytest.mark.parametrize(
    "text",
    [PROMPT, SOLUTION, PROMPT + SOLUTION, CRLF_PROBLEM["code"], CRLF_PROBLEM["text"]],
    ids=["prompt", "solution", "both", "code with CRLF", "question"],
)
def test_a_problem_is_found_however_it_is_spaced_or_embedded(tmp_path, text, change):
    path = lists(tmp_path, PROBLEM, CRLF_PROBLEM)
    rows = [record("planted", text=SPACED[change](text)), record("clean", text="x = 1\n" * 40)]

    kept, manifest, hits = run(tmp_path, [path], rows)

    assert kept == ["clean"]
    assert manifest.counts == Counts(rows_in=2, rows_out=1, used=1, dropped={"benchmark:own": 1})
    assert {hit["id"] for hit in hits} == {"planted"}


def test_prompts_completions_and_all_turns_of_a_dialogue_are_searched(tmp_path):
    def turns(*contents):
        roles = ("user", "assistant")
        return [
            {"role": roles[i % 2], "content": content, "train": bool(i % 2)}
            for i, content in enumerate(contents)
        ]

    rows = [
        record("asked", messages=turns(f"Please finish:\n{PROMPT}", "No.")),
        record("answered", messages=turns("Hi", "Hello", "Gaps?", f"Sure:\n{SOLUTION}")),
        record("prompt", prompt=PROMPT, completion="pass"),
        record("completion", prompt="Write code.", completion=PROMPT + SOLUTION),
        record("clean", messages=turns("What is a gap of numbers?", "A difference.")),
    ]

    kept, _, _ = run(tmp_path, [lists(tmp_path, PROBLEM)], rows[:2], rows[2:])

    assert kept == ["clean"]


def test_a_hit_is_reported_with_both_texts(tmp_path):
    body = f"before this\n{PROMPT}after that"

    _, manifest, hits = run(
        tmp_path, [lists(tmp_path, PROBLEM)], [record("clean", text="y")], [record("r", text=body)]
    )

    [hit] = [hit for hit in hits if hit["field"] == "prompt"]
    assert hit == {
        "file": "records-00001.parquet", "row": 0, "id": "r", "benchmark": "own",
        "problem": "Own/0", "field": "prompt", "coverage": 1.0, "ngrams": hit["ngrams"],
        "benchmark_text": PROMPT, "record_text": PROMPT.strip().removesuffix('\n    """'),
    }  # fmt: skip
    [sample] = manifest.report["samples"]["benchmark:own"]
    assert sample["id"] == "r"
    assert sample["detail"].startswith("Own/0 prompt (100% of ")
    assert sample["detail"].count("def largest_gap(numbers)") == 2
    assert manifest.report["problems_found"] == 1
    assert manifest.report["texts"] == {"own": 3}
    assert manifest.report["sources"]["s"] == {
        "rows_in": 2, "rows_out": 1, "dropped": {"benchmark:own": 1},
    }  # fmt: skip


def test_texts_too_short_to_say_anything_are_not_looked_for(tmp_path):
    short = {"task_id": "Own/1", "prompt": "def add(x, y):", "canonical_solution": "return x + y"}
    rows = [record("a", text="class A:\n    def add(x, y):\n        return x + y\n" * 3)]

    kept, manifest, _ = run(tmp_path, [lists(tmp_path, short)], rows)

    assert kept == ["a"]
    assert manifest.report["texts"] == {}, "prompt and solution together have seven words"


def test_numbers_alone_are_no_text_of_a_benchmark(tmp_path):
    counted = {"task_id": "Own/1", "inputs": [f"({number},)" for number in range(1, 11)]}
    rows = [record("a", text=f"TABLE = [{', '.join(map(str, range(200)))}]")]

    kept, manifest, _ = run(tmp_path, [lists(tmp_path, counted)], rows)

    assert kept == ["a"]
    assert manifest.report["texts"] == {}


def test_sharing_some_ngrams_is_no_contamination(tmp_path):
    head = " ".join(PROMPT.split()[:14])
    rows = [record("some", text=f"{head} and then quite other words follow in this text")]
    path = lists(tmp_path, PROBLEM)

    assert run(tmp_path / "half", [path], rows)[0] == ["some"]
    assert run(tmp_path / "tenth", [path], rows, coverage=0.05)[0] == []


def test_lists_of_every_format_give_the_same_texts(tmp_path):
    problems = [PROBLEM, {**PROBLEM, "task_id": "Own/1", "prompt": "another " * 20}]
    lines = "".join(json.dumps(problem) + "\n" for problem in problems)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(problems))
    pq.write_table(pa.Table.from_pylist(problems), tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            table = csv.DictWriter(file, list(problems[0]), delimiter=delimiter)
            table.writeheader()
            table.writerows(problems)

    found = [list(read_items(path)) for path in sorted(tmp_path.glob("a.*"))]

    assert len(found) == 6
    assert all(items == found[0] for items in found)
    assert [item.field for item in found[0]][:5] == [
        "task_id", "prompt", "canonical_solution", "entry_point", "prompt+canonical_solution",
    ]  # fmt: skip
    assert {item.problem for item in found[0]} == {"Own/0", "Own/1"}


def test_a_text_file_is_a_list_of_lines_and_a_folder_a_list_of_files(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    first = "the first question has more than eight words in it"
    second = "the second question has more than eight words in it"
    (folder / "questions.txt").write_text(f"{first}\n\n{second}\n")
    (folder / "own.py").write_text(PROMPT + SOLUTION)
    rows = [record("1", text=first), record("2", text=second), record("3", text=PROMPT + SOLUTION)]

    kept, manifest, _ = run(tmp_path, [folder], [*rows, record("4", text="none of it")])

    assert kept == ["4"]
    assert manifest.counts.dropped == {"benchmark:own": 1, "benchmark:questions": 2}


def test_changed_lists_change_the_key_and_no_list_keeps_every_byte(tmp_path):
    rows = [record("a", text=PROMPT)]
    path = lists(tmp_path, CRLF_PROBLEM)

    without, manifest, hits = run(tmp_path, [], rows)
    before = run(tmp_path, [path], rows)
    lists(tmp_path, CRLF_PROBLEM, PROBLEM)
    after = run(tmp_path, [path], rows)

    assert (without, before[0], after[0]) == (["a"], ["a"], [])
    assert before[1].key != after[1].key
    assert hits == []
    assert manifest.digest == before[1].digest


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("cut.jsonl", b'{"prompt": "a"}\n{"prompt": ', "cut.jsonl, line 2: not JSON"),
        ("latin.txt", b"caf\xe9", "latin.txt: a benchmark must be UTF-8 text"),
        ("latin.csv", b"Question\ncaf\xe9", "latin.csv: not a table in UTF-8 with a header"),
        ("no.parquet", b"PAR1 not", "no.parquet: not a Parquet file"),
        ("cut.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], "damaged gzip file"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_clear_error(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(SourceError, match=re.escape(problem)):
        run(tmp_path, [tmp_path / name], [record("a", text="x")])


def test_a_list_that_is_not_there_is_named_with_its_key(tmp_path):
    recipe = curation_recipe(curation={"decontaminate": {"against": ["/no/such.jsonl"]}})

    with pytest.raises(SourceError, match=r"curation\.decontaminate\.against\.0: /no/such\.jsonl"):
        decontaminate.params(recipe)


def test_the_part_that_is_shown_ends_where_the_hit_ends(tmp_path):
    around = "Größe\u00a0zählt, "
    rows = [record("a", text=around + SOLUTION.replace(" ", "\u00a0") + around)]

    _, _, [hit, *_] = run(tmp_path, [lists(tmp_path, {"text": SOLUTION})], rows)

    assert hit["record_text"].split() == SOLUTION.strip().removesuffix(")").split()


def test_adversarial_repeats_of_a_problem_stay_bounded(tmp_path):
    problems = [{**PROBLEM, "task_id": f"Own/{i}", "prompt": PROMPT + f"# {i}"} for i in range(60)]
    rows = [record("many", text=(PROMPT + SOLUTION) * 2000), record("line", text="x" * 5_000_000)]

    kept, _, hits = run(tmp_path, [lists(tmp_path, *problems)], rows)

    assert kept == ["line"]
    assert len(hits) <= 3 * 60


def test_the_result_is_the_same_for_one_and_two_workers(tmp_path):
    rows = [record(f"r{i}", text=text) for i, text in enumerate(clean_texts(30))]
    rows[::7] = [record(f"p{i}", text=PROMPT * i + SOLUTION) for i in range(len(rows[::7]))]
    shards = [rows[:10], rows[10:20], rows[20:]]
    path = lists(tmp_path, PROBLEM)

    one = run(tmp_path / "1", [path], *shards)
    two = run(tmp_path / "2", [path], *shards, workers=2)

    assert one[1].digest == two[1].digest
    assert one[2] == two[2]
    assert one[1].counts.dropped == {"benchmark:own": 5}


def changed_names(text, dice):
    names = sorted(set(re.findall(r"\b[a-z_]{3,}\b", text)) - {"def", "return"})
    for name in dice.sample(names, min(3, len(names))):
        text = re.sub(rf"\b{name}\b", f"{name}_x", text)
    return text


@pytest.mark.skipif(not REAL_DATA, reason="STARLOOM_REAL_DATA (folder with humaneval) is not set")
def test_humaneval_is_found_wherever_it_is_planted_and_not_in_clean_code(tmp_path):
    """The protocol of 200 planted records: 50 each verbatim, respaced, renamed, embedded."""
    path = Path(REAL_DATA) / "humaneval" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    dice = random.Random(0)
    bodies = [p["prompt"] + p["canonical_solution"] for p in dice.sample(problems, 50)]
    clean = clean_texts(600)
    rows = [record(f"clean:{i}", text=text) for i, text in enumerate(clean)]
    for number, body in enumerate(bodies):
        spaced = list(SPACED.values())[1 + number % 5](body)
        around = dice.choice(clean), dice.choice(clean)
        rows += [
            record(f"verbatim:{number}", text=body),
            record(f"spaced:{number}", text=spaced),
            record(f"renamed:{number}", text=changed_names(body, dice)),
            record(f"embedded:{number}", text=f"{around[0]}\n{body}\n{around[1]}"),
            record(f"prompt:{number}", text=problems[number]["prompt"]),
        ]
    dice.shuffle(rows)

    kept, _, hits = run(tmp_path, [path], rows[:400], rows[400:])

    left = [name.split(":")[0] for name in kept]
    assert [left.count(kind) for kind in ("verbatim", "spaced", "embedded", "prompt")] == [0] * 4
    assert left.count("renamed") <= 25
    assert left.count("clean") >= 0.995 * len(clean)
    assert {hit["benchmark"] for hit in hits} == {"HumanEval"}
