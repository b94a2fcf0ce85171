"""Cuts a Python file into units: every function that has a docstring and a body.

A unit's prompt is the cleaned docstring; its completion is the function's source with the
docstring's characters cut out (their line stays, as in the project's seed data) and dedented to
column 0. Invariant: a completion parses to the function's own syntax tree without its docstring.
"""

import ast
import contextlib
import inspect
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.records import clean_text

Function = ast.FunctionDef | ast.AsyncFunctionDef
Lines = list[tuple[int, str]]  # (line number in the file, text)


class Unusable(ValueError):
    """A file that yields nothing; `reason` says why."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Unit:
    """One function: qualified name, first and last line in the file, docstring and source."""

    name: str
    lines: tuple[int, int]
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A function with a docstring that yields no record, and why."""

    name: str
    reason: str


def read_source(path: Path, max_bytes: int) -> str:
    """Return a file's text without byte order mark and with Unix line ends; raises Unusable.

    A file above `max_bytes` is not read at all. Only UTF-8 is accepted, whatever a coding line
    says; Python's own reading of the file is the same then.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise Unusable("too_large", f"{size} bytes, at most {max_bytes}")
        data = path.read_bytes()
    except OSError as error:
        raise Unusable("unreadable", error.strerror or str(error)) from error
    if not data.strip():
        raise Unusable("empty")
    if b"\0" in data:
        raise Unusable("nul_bytes", f"at byte {data.index(0)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("not_utf8", f"{error.reason} at byte {error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def extract_units(text: str, tree: ast.Module) -> Iterator[Unit | Skipped]:
    """Yield the documented functions of a parsed source in its order.

    A qualified name that occurs again (overloads, property setters, branches) gets "#2", "#3".
    """
    lines = text.split("\n")
    seen: Counter[str] = Counter()
    for qualname, node in _functions(tree):
        seen[qualname] += 1
        name = qualname if seen[qualname] == 1 else f"{qualname}#{seen[qualname]}"
        docstring = ast.get_docstring(node, clean=False)
        prompt = inspect.cleandoc(docstring) if docstring else ""
        if not prompt.strip():
            continue
        if len(node.body) == 1:
            yield Skipped(name, "nothing_but_a_docstring")
        elif clean_text(prompt) is None:
            yield Skipped(name, "docstring_not_text")
        else:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            last = node.end_lineno or node.lineno
            yield Unit(name, (first, last), prompt, _completion(lines, node, first, last))


def _functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield (qualified name, function) in source order, without recursion: elif chains nest."""
    todo: list[tuple[str, ast.AST]] = [("", tree)]
    while todo:
        scope, node = todo.pop()
        if isinstance(node, Function):
            yield scope + node.name, node
            scope += f"{node.name}.<locals>."
        elif isinstance(node, ast.ClassDef):
            scope += f"{node.name}."
        inner = [
            (scope, child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        ]
        todo.extend(reversed(inner))


def _completion(lines: list[str], node: Function, first: int, last: int) -> str:
    numbered = [(number, lines[number - 1]) for number in range(first, last + 1)]
    numbered[-1] = (last, _until(numbered[-1][1], node.end_col_offset))
    indent = _until(lines[node.lineno - 1], node.col_offset)
    return "\n".join(_dedent(_cut_docstring(numbered, node.body[0]), indent))


def _until(line: str, offset: int | None) -> str:
    """Return a line up to an offset of the syntax tree, which counts UTF-8 bytes."""
    return line.encode()[:offset].decode()


def _cut_docstring(lines: Lines, docstring: ast.stmt) -> Lines:
    start, end = docstring.lineno, docstring.end_lineno or docstring.lineno
    by_number = dict(lines)
    before = _until(by_number[start], docstring.col_offset)
    after = by_number[end].encode()[docstring.end_col_offset :].decode()
    # `"doc"; return 1` on one line: a semicolon that follows nothing does not parse.
    joined = before + re.sub(r"^\s*;\s*", "", after)
    return (
        [line for line in lines if line[0] < start]
        + [(start, joined)]
        + [line for line in lines if line[0] > end]
    )


def _dedent(lines: Lines, indent: str) -> list[str]:
    """Take the function's indentation from its lines, except from inside of string literals."""
    texts = [text for _, text in lines]
    if not indent:
        return texts
    kept = _lines_inside_strings(texts)
    return [
        text if number in kept else text.removeprefix(indent) if text.startswith(indent)
        # Comments and continued lines may stand further left than the function.
        else text.lstrip(" \t")
        for number, text in enumerate(texts)
    ]  # fmt: skip


def _lines_inside_strings(texts: list[str]) -> set[int]:
    """Return the positions of lines that begin inside a string literal."""
    source = "\n".join(texts)
    if '"""' not in source and "'''" not in source and "\\\n" not in source:
        return set()
    # The lines are an indented block; below an `if` they tokenize as they stand.
    tokens = tokenize.generate_tokens(io.StringIO(f"if 1:\n{source}\n").readline)
    inside: set[int] = set()
    # The tokenizer in Python is stricter than the one in C; what parsed must not stop the run.
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokens:
            if token.type == tokenize.STRING:
                inside.update(range(token.start[0] - 1, token.end[0] - 1))
    return inside
