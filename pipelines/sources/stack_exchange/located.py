"""Finds the tables of a dump: plain files, gzip files or 7z archives, and the site's name."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import SourceError

TABLES = {"Posts": "posts", "Users": "users", "PostLinks": "postlinks"}  # table: root element
SITE = re.compile(
    r"(?:[a-z0-9-]+\.)*(?:stackexchange|stackoverflow|superuser|serverfault|askubuntu|stackapps)"
    r"\.com|(?:meta\.)?mathoverflow\.net"
)
TABLE_SUFFIX = re.compile(r"-(?:Posts|Users|PostLinks)$")  # stackoverflow.com-Posts.7z
PACKED = (".xml", ".xml.gz", ".7z")


@dataclass(frozen=True, slots=True)
class Located:
    """The folder of a dump and the files in it, by table; an archive may hold more than one."""

    root: Path
    files: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the distinct file names, sorted."""
        return tuple(sorted(set(self.files.values())))


def locate_dump(path: Path) -> Located:
    """Find Posts and, where they are, Users and PostLinks; SourceError where there are no posts.

    `path` is a file (Posts.xml, Posts.xml.gz, a .7z archive) or a folder that holds one.
    """
    if path.is_file():
        if not path.name.endswith(PACKED):
            raise SourceError(
                f"{path} is neither .xml, .xml.gz nor .7z; expected Posts.xml of a Stack Exchange "
                "dump, packed or not, or the folder it lies in"
            )
        return Located(path.parent, {"Posts": path.name, **_find_beside(path)})
    if not path.is_dir():
        raise SourceError(f"{path} does not exist; expected a Stack Exchange dump")
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    posts = _find_table("Posts", names)
    if posts is None:
        archives = sorted(name for name in names if name.endswith(".7z"))
        posts = next((name for name in archives if name.endswith("-Posts.7z")), None)
        if posts is None and len(archives) == 1:
            [posts] = archives
        if posts is None:
            found = f"{len(archives)} archives" if archives else "no archive"
            raise SourceError(
                f"{path} holds no Posts.xml, Posts.xml.gz or Posts.7z, and {found}; name the file"
            )
    return Located(path, {"Posts": posts, **_find_beside(path / posts)})


def _find_table(table: str, names: Iterable[str]) -> str | None:
    return next((table + suffix for suffix in PACKED if table + suffix in names), None)


def _find_beside(posts: Path) -> dict[str, str]:
    """Return the files of the other tables that lie beside the posts' file."""
    names = {entry.name for entry in posts.parent.iterdir() if entry.is_file()}
    if posts.name.endswith("-Posts.7z"):
        site = posts.name.removesuffix("-Posts.7z")
        wanted = {table: f"{site}-{table}.7z" for table in TABLES if table != "Posts"}
        return {table: name for table, name in wanted.items() if name in names}
    if posts.suffix == ".7z" and posts.name != "Posts.7z":
        return {}  # the archive of a site holds all its tables
    found = {table: _find_table(table, names) for table in TABLES if table != "Posts"}
    return {table: name for table, name in found.items() if name}


def site_of(path: Path) -> str | None:
    """Return the site that a dump's file or folder is named after, or None.

    >>> site_of(Path("dumps/cardano.stackexchange.com.7z"))
    'cardano.stackexchange.com'
    >>> site_of(Path("stackoverflow.com/Posts.xml"))
    'stackoverflow.com'
    """
    for name in (path.name, path.parent.name):
        bare = TABLE_SUFFIX.sub("", name.removesuffix(".7z"))
        if SITE.fullmatch(bare.lower()):
            return bare.lower()
    return None
