"""Finds the license of source files: SPDX lines, license files, package metadata.

A license is read or recognized, never assumed: where there is none, the recipe has to name it.
"""

import re
from collections.abc import Iterable, Mapping
from email.message import Message
from pathlib import Path, PurePosixPath

SPDX_LINE = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\-() ]*[A-Za-z0-9.+)])")
SPDX_LINE_WITHIN = 4096
LICENSE_FILE = re.compile(
    r"(?:licen[cs]e|copying)(?:-[\w.-]+)?(?:\.txt|\.md|\.rst)?", re.IGNORECASE
)

# A text is recognized by a sentence that its license has and the others have not.
TEXTS = (
    ("Apache-2.0", r"Apache License,?\s+Version 2\.0"),
    ("MPL-2.0", r"Mozilla Public License,?\s+Version 2\.0"),
    ("AGPL-3.0-only", r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3"),
    ("LGPL-3.0-only", r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3"),
    ("GPL-3.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 3"),
    ("GPL-2.0-only", r"GNU GENERAL PUBLIC LICENSE\s+Version 2"),
    ("BSD-3-Clause", r"Redistribution and use in source[\s\S]*Neither the name"),
    ("BSD-2-Clause", r"Redistribution and use in source"),
    ("ISC", r"Permission to use, copy, modify, and(?:/or)? distribute"),
    ("MIT", r"Permission is hereby granted, free of charge"),
)


def spdx_of(text: str) -> str | None:
    """Return the license that a file's SPDX-License-Identifier line near its top names."""
    found = SPDX_LINE.search(text[:SPDX_LINE_WITHIN])
    return found[1].strip() if found else None


def recognize(text: str) -> str | None:
    """Return the SPDX id of a well-known license text, or None."""
    return next((name for name, pattern in TEXTS if re.search(pattern, text, re.IGNORECASE)), None)


def _read_head(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(40_000).decode("utf-8", errors="replace")


def folder_licenses(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Return {folder: license} from the license files among `names`, "" being the root.

    A vendored folder whose license file is not recognized gets "see PATH" rather than the license
    of what surrounds it; at the root an unrecognized text yields nothing.
    """
    found: dict[str, set[str]] = {}
    for name in sorted(names):
        path = PurePosixPath(name)
        if LICENSE_FILE.fullmatch(path.name):
            folder = "" if str(path.parent) == "." else str(path.parent)
            license_ = recognize(_read_head(root / name))
            if license_ or folder:
                found.setdefault(folder, set()).add(license_ or f"see {name}")
    return {folder: " OR ".join(sorted(texts)) for folder, texts in found.items()}


def nearest_license(name: str, licenses: Mapping[str, str]) -> str | None:
    """Return the license of the closest folder around a file that has one."""
    for folder in PurePosixPath(name).parents:
        found = licenses.get("" if str(folder) == "." else str(folder))
        if found:
            return found
    return None


def metadata_license(metadata: "Message[str, str]") -> str | None:
    """Return the license that a distribution's metadata names, the most exact field first."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    text = str(metadata.get("License") or "").strip()
    # Older packages paste the whole text into the field.
    if text and "\n" not in text and len(text) <= 64 and text.upper() != "UNKNOWN":
        return text
    classifiers = metadata.get_all("Classifier") or []
    named = [c.split(" :: ")[-1] for c in classifiers if c.startswith("License :: ")]
    return next((name for name in named if name != "OSI Approved"), None)


def is_allowed(expression: str, wanted: Iterable[str]) -> bool:
    """Say whether an SPDX expression can be met by some licenses alone.

    One side of an OR is enough, both of an AND are needed; an exception (WITH) widens a license.

    >>> is_allowed("MIT AND (GPL-2.0-only OR BSD-3-Clause)", ["mit", "BSD-3-Clause"])
    True
    """
    names = {name.lower() for name in wanted}
    if expression.lower() in names:
        return True
    if {"+", "-"} & set(expression.split()):
        return False
    text = re.sub(r"\s+with\s+\S+", "", expression.lower().replace("(", " ( ").replace(")", " ) "))
    # From the innermost parentheses outward, without recursion; "+" stands for what is met.
    while inner := re.search(r"\(([^()]*)\)", text):
        met = "+" if _is_met(inner[1], names) else "-"
        text = f"{text[: inner.start()]}{met}{text[inner.end() :]}"
    return _is_met(text, names)


def _is_met(text: str, names: set[str]) -> bool:
    choices = [choice.split(" and ") for choice in re.split(r"\s+or\s+", text.strip())]
    return any(
        all((part := both.strip()) == "+" or part in names for both in choice) for choice in choices
    )
