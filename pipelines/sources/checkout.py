"""A folder of code as git sees it: what .gitignore leaves out, what .gitattributes says."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

from pipelines.errors import SourceError

IGNORE_FILE = ".gitignore"
ATTRIBUTES_FILE = ".gitattributes"
MAX_RULES_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of .gitignore or one pattern of .gitattributes, matched against a path alone.

    pathspec's expressions also match what lies below a folder that matches. Folders are asked on
    the way down here, so a match counts only where it is of the path itself, as in git.
    """

    regex: re.Pattern[str]
    include: bool
    contents_only: bool

    def matches(self, name: str) -> bool:
        """Say whether a path, with a slash at its end if it is a folder, is meant."""
        marked = "ps_d" in self.regex.groupindex
        for found in self.regex.finditer(name):
            inner = marked and found["ps_d"] is not None and found.end("ps_d") != len(name)
            itself = self.contents_only and found.end() == len(name)
            if not inner and not itself:
                return True
        return False


Rules = tuple[tuple[str, tuple[Rule, ...]], ...]  # (folder with "/" or "", its rules)


def list_checkout(root: Path) -> Iterator[str]:
    """Yield the paths of all files below a folder that no .gitignore in it leaves out.

    Paths are relative, with "/" between parts. Hidden files and folders are passed over, and so is
    every symbolic link: what one points to inside the tree is found by itself, and what lies
    outside is not part of the source. Raises SourceError for a folder that cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise SourceError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    rules: dict[str, Rules] = {}
    for place, folders, files in os.walk(root, onerror=fail):
        folder = "" if place == str(root) else f"{Path(place).relative_to(root).as_posix()}/"
        above = rules.pop(folder, ())
        own = _read_ignore(Path(place, IGNORE_FILE)) if IGNORE_FILE in files else ()
        current = (*above, (folder, own)) if own else above
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_ignored(f"{folder}{name}/", current)
        ]
        rules.update((f"{folder}{name}/", current) for name in folders)
        for name in files:
            if name.startswith(".") or _is_ignored(folder + name, current):
                continue
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                yield folder + name


def _is_ignored(name: str, rules: Rules) -> bool:
    """Say what the last rule that matches says, those of deeper folders going first."""
    for folder, own in reversed(rules):
        inner = name.removeprefix(folder)
        for rule in reversed(own):
            if rule.matches(inner):
                return rule.include
    return False


def _read_ignore(path: Path) -> tuple[Rule, ...]:
    return tuple(filter(None, map(_compile, _read_lines(path))))


def _compile(line: str) -> Rule | None:
    """Return a rule, None for a comment and for what git could not understand either."""
    try:
        pattern = GitIgnoreSpecPattern(line)
    except ValueError:
        return None
    if pattern.include is None or pattern.regex is None:
        return None
    return Rule(pattern.regex, pattern.include, line.rstrip().endswith("/**"))


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RULES_BYTES).decode("utf-8-sig", errors="replace")
    except OSError:
        return []
    return text.replace("\r\n", "\n").split("\n")


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the .gitattributes of a tree say: (folder, pattern, attribute, value), in order."""

    rules: tuple[tuple[str, Rule, str, bool | None], ...] = ()

    def get(self, name: str, attribute: str) -> bool | None:
        """Return whether an attribute is set for a path; None where nothing is said of it."""
        for folder, rule, named, value in reversed(self.rules):
            inside = named == attribute and name.startswith(folder)
            if inside and rule.matches(name.removeprefix(folder)):
                return value
        return None


def read_attributes(root: Path, names: Iterable[str], wanted: Iterable[str]) -> Attributes:
    """Read the .gitattributes in the folders of the named files, for some attributes.

    Rules of deeper folders come later and win, as in git.
    """
    folders = {""}
    for name in names:
        for parent in PurePosixPath(name).parents:
            folder = "" if str(parent) == "." else f"{parent}/"
            if folder in folders:
                break
            folders.add(folder)
    rules = []
    attributes = frozenset(wanted)
    for folder in sorted(folders, key=lambda name: (name.count("/"), name)):
        for line in _read_lines(root / folder / ATTRIBUTES_FILE):
            rules += [(folder, *rule) for rule in _parse_rule(line, attributes)]
    return Attributes(tuple(rules))


def _parse_rule(line: str, wanted: frozenset[str]) -> Iterator[tuple[Rule, str, bool | None]]:
    pattern, *words = line.split() or [""]
    if not words or pattern.startswith(("#", "!", "[attr]")):
        return
    found = [(word, value) for word, value in map(_parse_attribute, words) if word in wanted]
    rule = _compile(pattern.strip('"')) if found else None
    if rule is not None:
        yield from ((rule, name, value) for name, value in found)


def _parse_attribute(word: str) -> tuple[str, bool | None]:
    """Return (name, value) of `name`, `-name`, `!name` and `name=value`."""
    if word.startswith("!"):
        return word[1:], None
    name, sign, value = word.lstrip("-").partition("=")
    return name, not word.startswith("-") and (not sign or value.lower() not in ("false", "0"))
