"""Cuts a Python file into units: functions, methods and classes with a docstring and a body.

A unit's prompt is the cleaned docstring; its completion is the source with the docstring's
characters cut out and dedented to column 0. In the form `seed` the docstring's line stays behind
with its indentation, as in the project's seed data; in the form `clean` it goes.
Invariant: a completion parses to the unit's own syntax tree without its docstring.
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
from itertools import zip_longest
from typing import Any, Literal

from pipelines.records import clean_text
from pipelines.sources.docstrings import strip_doctests
from pipelines.syntax import BadSyntax, parse_python

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Kind = Literal["function", "method", "class"]
Lines = list[tuple[int, str]]  # (line number in the file, text)

BLANK = " \t\f"


@dataclass(frozen=True, slots=True)
class Unit:
    """One definition: qualified name, first and last line in the file, docstring and source."""

    name: str
    lines: tuple[int, int]
    prompt: str
    completion: str
    kind: Kind = "function"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A definition that yields no record, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Form:
    """Which definitions are cut, and how."""

    kinds: frozenset[str] = frozenset({"function", "method"})
    completion: Literal["seed", "clean"] = "seed"
    strip_doctests: bool = False


SEED_FORM = Form()


def extract_units(text: str, tree: ast.Module, form: Form = SEED_FORM) -> Iterator[Unit | Skipped]:
    """Yield the documented definitions of a parsed source in its order.

    A qualified name that occurs again (property setters, branches) gets "#2", "#3": which one does
    not depend on the form. Overloads have no body of their own and are skipped.
    """
    lines = text.split("\n")
    seen: Counter[str] = Counter()
    for qualname, kind, node in _definitions(tree):
        seen[qualname] += 1
        name = qualname if seen[qualname] == 1 else f"{qualname}#{seen[qualname]}"
        if kind not in form.kinds:
            continue
        found = _cut(name, kind, node, lines, form)
        if found is not None:
            yield found


def _cut(
    name: str, kind: Kind, node: Definition, lines: list[str], form: Form
) -> Unit | Skipped | None:
    if any(map(_is_overload, node.decorator_list)):
        return Skipped(name, "overload")
    docstring = ast.get_docstring(node, clean=False)
    prompt = inspect.cleandoc(docstring) if docstring else ""
    if not prompt.strip():
        return None
    if len(node.body) == 1:
        return Skipped(name, "nothing_but_a_docstring")
    if clean_text(prompt) is None:
        return Skipped(name, "docstring_not_text")
    if form.strip_doctests:
        prompt = strip_doctests(prompt)
        if not prompt:
            return Skipped(name, "nothing_but_doctests")
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    last = node.end_lineno or node.lineno
    completion = _completion(lines, node, first, last, form)
    if completion is None:
        return Skipped(name, "cannot_be_cut")
    return Unit(name, (first, last), prompt, completion, kind)


def _is_overload(decorator: ast.expr) -> bool:
    name = decorator.attr if isinstance(decorator, ast.Attribute) else decorator
    return name == "overload" or (isinstance(name, ast.Name) and name.id == "overload")


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Kind, Definition]]:
    """Yield (qualified name, kind, node) in source order, without recursion: elif chains nest."""
    todo: list[tuple[str, Kind, ast.AST]] = [("", "function", tree)]
    while todo:
        scope, kind, node = todo.pop()
        if isinstance(node, ast.ClassDef):
            yield scope + node.name, "class", node
            scope, kind = f"{scope}{node.name}.", "method"
        elif isinstance(node, Definition):
            yield scope + node.name, kind, node
            scope, kind = f"{scope}{node.name}.<locals>.", "function"
        inner = [
            (scope, kind, child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        ]
        todo.extend(reversed(inner))


def _completion(
    lines: list[str], node: Definition, first: int, last: int, form: Form
) -> str | None:
    """Return a definition's source without its docstring; None where its lines defy cutting."""
    numbered = [(number, lines[number - 1]) for number in range(first, last + 1)]
    numbered[-1] = (last, _until(numbered[-1][1], node.end_col_offset))
    indent = _until(lines[node.lineno - 1], node.col_offset)
    if indent.strip(BLANK):
        return None
    cut = _cut_docstring(numbered, node.body[0], keep_line=form.completion == "seed")
    texts, regular = _dedent(cut, indent)
    completion = "\n".join(texts)
    # Tabs beside blanks, form feeds and continued lines may nest otherwise than they look.
    return completion if regular or _same_code(completion, node) else None


def _until(line: str, offset: int | None) -> str:
    """Return a line up to an offset of the syntax tree, which counts UTF-8 bytes."""
    return line.encode()[:offset].decode()


def _cut_docstring(lines: Lines, docstring: ast.stmt, *, keep_line: bool) -> Lines:
    start, end = docstring.lineno, docstring.end_lineno or docstring.lineno
    by_number = dict(lines)
    before = _until(by_number[start], docstring.col_offset)
    after = by_number[end].encode()[docstring.end_col_offset :].decode()
    # `"doc"; return 1` on one line: a semicolon that follows nothing does not parse.
    joined = before + re.sub(r"^\s*;\s*", "", after)
    rest = [line for line in lines if line[0] > end]
    if keep_line or joined.strip(BLANK):
        return [*(line for line in lines if line[0] < start), (start, joined), *rest]
    while rest and not rest[0][1].strip(BLANK):
        rest = rest[1:]
    return [*(line for line in lines if line[0] < start), *rest]


def _dedent(lines: Lines, indent: str) -> tuple[list[str], bool]:
    """Take a definition's indentation from its lines, except from inside of string literals.

    Returns the lines, and whether every one that is not blank began with just that indentation.
    """
    texts = [text for _, text in lines]
    if not indent:
        return texts, True
    kept = _lines_inside_strings(texts)
    indent = _after_form_feed(indent)
    dedented, regular = [], True
    for number, text in enumerate(texts):
        if number in kept:
            dedented.append(text)
            continue
        line = _after_form_feed(text)
        if not line.startswith(indent):
            # Comments and continued lines may stand further left than the definition.
            regular = regular and not line.strip()
            line = line.lstrip(BLANK)
        dedented.append(line.removeprefix(indent))
    return dedented, regular


def _after_form_feed(text: str) -> str:
    """Return a line from the last form feed of its indentation on: it sets the width to nothing."""
    body = text.lstrip(BLANK)
    return text[: len(text) - len(body)].rpartition("\f")[2] + body


def _same_code(completion: str, node: Definition) -> bool:
    """Say whether a completion parses to the definition it was cut from, less its docstring."""
    try:
        [found] = parse_python(completion).body
    except (BadSyntax, ValueError):
        return False
    if not isinstance(found, type(node)):
        return False
    # Compared without recursion: what nests deep must not depend on the stack that is left.
    fields: dict[str, Any] = {name: getattr(node, name, None) for name in node._fields}
    bare = type(node)(**fields)
    bare.body = node.body[1:]
    pairs = zip_longest(ast.walk(found), ast.walk(bare))
    return all(_plain(left) == _plain(right) for left, right in pairs)


def _plain(node: ast.AST | None) -> tuple[object, ...]:
    values = [getattr(node, name, None) for name in node._fields] if node else []
    return (type(node), *(v for v in values if not isinstance(v, ast.AST | list)))


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
