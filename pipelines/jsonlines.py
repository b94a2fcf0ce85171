"""JSON lines that another process appends to and may be killed at: a cut line is passed over."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file; none where it does not exist."""
    return list(_parse(path.read_bytes())) if path.exists() else []


def read_new(path: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines written since `place`, and the next place; a resume cuts it back."""
    size = path.stat().st_size if path.exists() else 0
    if size <= place:
        return [], size
    with path.open("rb") as file:
        file.seek(place)
        text = file.read(size - place)
    end = text.rfind(b"\n") + 1
    return list(_parse(text[:end])), place + end


def _parse(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:
            continue
