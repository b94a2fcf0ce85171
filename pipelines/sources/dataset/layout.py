"""Finds the data files of a dataset: what is data, which split a name says, whether parts miss."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from pipelines.errors import SourceError
from pipelines.sources.raw import glob_pattern, list_folder

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
LINES, JSON, TABLE, PARQUET, ARROW = "lines", "json", "table", "parquet", "arrow"
KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": JSON,
    ".csv": TABLE,
    ".tsv": TABLE,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".feather": ARROW,
}
# What describes a dataset and is none of its rows; `cache-` files are leftovers of `datasets.map`.
NOT_ROWS = re.compile(
    r"(?:cache-.*\.arrow|indices.*\.arrow|state\.json|dataset_info(?:s)?\.json|dataset_dict\.json"
    r"|fetched\.json|config\.json|metadata\.json|package(?:-lock)?\.json|tokenizer.*\.json)"
)

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# train, train_sft, data-train, train-00000-of-00001; not test_cases or training_notes.
SPLIT_NAME = re.compile(
    rf"(?:.*[-_.])?({'|'.join(SPLITS)})(?:_(?:ift|sft|gen|prefs|rm|rl|dpo|chat))?"
    r"(?:[-_.]?\d+)?(?:-of-\d+)?(?:-[0-9a-f]{8,})?",
    re.IGNORECASE,
)
PART_NAME = re.compile(r"(.*?)-?(\d{5})-of-(\d{5})(.*)")

# The hub writes licenses in lower case; these are the ones whose SPDX id is written otherwise.
SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0 MIT BSD-2-Clause BSD-3-Clause GPL-2.0 GPL-3.0 LGPL-2.1 LGPL-3.0 AGPL-3.0 "
        "MPL-2.0 ISC Unlicense CC0-1.0 CC-BY-2.0 CC-BY-2.5 CC-BY-3.0 CC-BY-4.0 CC-BY-SA-3.0 "
        "CC-BY-SA-4.0 CC-BY-NC-2.0 CC-BY-NC-3.0 CC-BY-NC-4.0 CC-BY-NC-SA-4.0 CC-BY-ND-4.0 "
        "CC-BY-NC-ND-4.0 ODC-By PDDL ODbL"
    ).split()
}


def kind_of(name: str) -> str | None:
    """Return the kind of a data file by its suffix, a compression's suffix passed over."""
    path = PurePosixPath(name.lower())
    if NOT_ROWS.fullmatch(path.name):
        return None
    if path.suffix in COMPRESSIONS:
        kind = KINDS.get(PurePosixPath(path.stem).suffix)
        return kind if kind in (LINES, JSON, TABLE) else None
    return KINDS.get(path.suffix)


def compression_of(name: str) -> str:
    """Return a file's compression suffix, "" for none."""
    suffix = PurePosixPath(name.lower()).suffix
    return suffix if suffix in COMPRESSIONS else ""


def split_named(name: str) -> str | None:
    """Return the split that a word (a file's stem, a folder, a column's value) names, or None.

    >>> split_named("train_ift"), split_named("dev"), split_named("test-00000-of-00001")
    ('train', 'validation', 'test')
    >>> split_named("test_cases") is None
    True
    """
    found = SPLIT_NAME.fullmatch(name)
    return SPLITS[found[1].lower()] if found else None


def split_of(name: str) -> str | None:
    """Return the split of a file below a folder: by its own name, else by the closest folder."""
    path = PurePosixPath(name)
    stem = path.name
    while PurePosixPath(stem).suffix.lower() in (*KINDS, *COMPRESSIONS):
        stem = PurePosixPath(stem).stem
    words = (stem, *(part.name for part in path.parents if part.name))
    return next((split for split in map(split_named, words) if split), None)


def list_files(root: Path) -> Iterator[str]:
    """Yield the files below a folder; in a snapshot of the hub's cache links to its blobs too."""
    yield from list_folder(root)
    if root.parent.name != "snapshots":
        return
    blobs = (root.parent.parent / "blobs").resolve()
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            if path.is_symlink() and path.is_file() and path.resolve().parent == blobs:
                yield path.relative_to(root).as_posix()


def select_files(
    names: Iterable[str], files: Iterable[str], exclude: Iterable[str]
) -> tuple[str, ...]:
    """Return the data files that match `files` (all, if empty) and none of `exclude`, sorted."""
    wanted = [glob_pattern(glob) for glob in files]
    unwanted = [glob_pattern(glob) for glob in exclude]
    return tuple(
        sorted(
            name
            for name in names
            if kind_of(name)
            and (not wanted or any(pattern.fullmatch(name) for pattern in wanted))
            and not any(pattern.fullmatch(name) for pattern in unwanted)
        )
    )


def check_parts(root: Path, names: Iterable[str]) -> None:
    """Raise SourceError where a dataset in numbered parts lacks some."""
    parts: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        found = PART_NAME.fullmatch(name)
        if found:
            parts.setdefault((found[1], found[3], found[4]), set()).add(int(found[2]))
    for (stem, total, rest), numbers in sorted(parts.items()):
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            shown = f"{stem}-{missing[0]:05d}-of-{total}{rest}"
            raise SourceError(
                f"{root}: {len(missing)} of {int(total)} parts are missing, the first is {shown}; "
                "download the dataset again, or name the files to read with `files:`"
            )


def check_saved(root: Path, found: Iterable[str]) -> None:
    """Raise SourceError where a folder written by `save_to_disk` lacks a file it lists."""
    for name in sorted(name for name in found if PurePosixPath(name).name == "state.json"):
        _check_state(root / PurePosixPath(name).parent)


def _check_state(folder: Path) -> None:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        listed = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{folder}: state.json lists {missing[0]}, which is not there; save the dataset again"
        )


def card_license(root: Path) -> str | None:
    """Return the license that a dataset card's front matter names, as SPDX where it is known."""
    try:
        text = (root / "README.md").read_text(encoding="utf-8")[:20_000]
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    named = (
        re.search(r"^license:[ \t]*['\"]?([\w.+-]+)['\"]?[ \t]*$", front[1], re.MULTILINE)
        if front
        else None
    )
    if named is None or named[1].lower() in ("other", "unknown", "none"):
        return None
    return SPDX.get(named[1].lower(), named[1])
