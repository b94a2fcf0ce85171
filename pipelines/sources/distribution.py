"""What Python packages say of themselves: installed ones, unpacked sdists and wheels.

A package is found through its metadata and is never imported.
"""

import re
from collections.abc import Iterable, Sequence
from email import message_from_string
from email.message import Message
from email.utils import getaddresses
from importlib import metadata
from pathlib import Path
from typing import cast

from pipelines.errors import did_you_mean
from pipelines.sources.licenses import folder_licenses, metadata_license
from pipelines.sources.raw import Origin

GITHUB = re.compile(r"(?:https?://github\.com/|^)([\w.-]+/[\w.-]+?)(?:\.git)?/?")
SOURCE_LABELS = ("source", "sourcecode", "repository", "code", "github", "homepage")
MAX_METADATA_BYTES = 1_000_000


def distribution_problem(name: str) -> str | None:
    """Say in one sentence that a distribution is not installed, or return None."""
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        known = {d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"]}
        return (
            f"distribution {name!r} is not installed{did_you_mean(name, sorted(known))}; "
            "install it or name a local `path:`"
        )
    return None


def find_installed(name: str, revision: str | None) -> tuple[Path, list[str], Origin]:
    """Return the folder, the files (paths below it) and the origin of an installed package."""
    distribution = metadata.distribution(name)
    root = Path(str(distribution.locate_file("")))
    # Scripts and data are listed as ../../bin/...: they lie outside the packages.
    found = [f.as_posix() for f in distribution.files or () if ".." not in f.parts]
    packaged = [name for name in found if ".dist-info/" not in name]
    about = cast("Message[str, str]", distribution.metadata)
    return root, packaged, describe(root, packaged, about, revision or distribution.version)


def find_metadata(root: Path) -> "Message[str, str] | None":
    """Return the metadata of an unpacked sdist (PKG-INFO) or wheel (METADATA) in a folder."""
    found = [root / "PKG-INFO", *sorted(root.glob("*.dist-info/METADATA"))]
    for path in found:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                text = file.read(MAX_METADATA_BYTES).decode("utf-8", errors="replace")
            return message_from_string(text)
    return None


def describe(root: Path, files: Iterable[str], about: "Message[str, str]", revision: str) -> Origin:
    """Return the origin of a package's files as its metadata and license files tell it."""
    named = metadata_license(about)
    page = _source_page(about.get_all("Project-URL") or [], about.get("Home-page"))
    return Origin(
        revision=revision,
        url=page,
        blob=f"{page}/blob/{revision}/" if page else "",
        author=_author(about.get("Author-email"), about.get("Maintainer-email"))
        or about.get("Author")
        or about.get("Maintainer"),
        licenses={**folder_licenses(root, files), **({"": named} if named else {})},
    )


def _author(*fields: str | None) -> str | None:
    """Return the names in address fields; the addresses themselves are nobody's business."""
    names = [name for name, _ in getaddresses([field for field in fields if field]) if name]
    return ", ".join(dict.fromkeys(names)) or None


def _source_page(project_urls: Sequence[str], homepage: str | None) -> str | None:
    """Return the GitHub page among a distribution's links, preferring the one named source."""
    pages = {"homepage": homepage or ""}
    for entry in project_urls:
        label, _, url = entry.partition(",")
        pages[re.sub(r"[^a-z]", "", label.lower())] = url.strip()
    found = (github_page(pages.get(label, "")) for label in SOURCE_LABELS)
    return next((page for page in found if page), None)


def github_page(repository: str) -> str | None:
    """Return https://github.com/OWNER/NAME for an address or OWNER/NAME, else None."""
    found = GITHUB.fullmatch(repository)
    return f"https://github.com/{found[1]}" if found else None
