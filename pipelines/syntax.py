"""Parses Python source to the same verdict wherever it is called from."""

import ast
import contextlib
import gc
import symtable
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Parsed = TypeVar("Parsed")

# Warning filters and garbage collection belong to the whole process; parsing holds the
# interpreter's lock anyway.
_parsing = threading.Lock()


class BadSyntax(ValueError):
    """Source that Python cannot parse; `reason` is "does_not_parse" or "too_deep"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_python(source: str) -> ast.Module:
    """Return the syntax tree of a decoded source; raises BadSyntax."""
    return _read(lambda: ast.parse(source))


def is_python(source: str) -> bool:
    """Say whether a source parses and its names are what Python lets them be.

    Takes a third of the time of `parse_python`, most of which goes into a tree of Python objects.
    """
    try:
        _read(lambda: symtable.symtable(source, "<unknown>", "exec"))
    except BadSyntax:
        return False
    return True


def _read(parse: Callable[[], Parsed]) -> Parsed:
    """Return what a parser makes of its source; raises BadSyntax.

    How deep source may nest depends on the stack that is left, so every parse gets a thread, hence
    a stack, of its own: else a file could parse in a pool process and fail in the main one.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="parse") as thread:
        return thread.submit(_try, parse).result()


def _try(parse: Callable[[], Parsed]) -> Parsed:
    try:
        with _parsing, warnings.catch_warnings(), _alone():
            # With `python -W error` an invalid escape would turn into a syntax error.
            warnings.simplefilter("ignore")
            return parse()
    except SyntaxError as error:
        raise BadSyntax("does_not_parse", f"line {error.lineno}: {error.msg}") from None
    except (RecursionError, MemoryError) as error:
        text = str(error) or "the parser's stack overflowed"
        raise BadSyntax("too_deep", text) from None
    except ValueError as error:
        raise BadSyntax("does_not_parse", str(error)) from None


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let no other thread run in a parse: collecting garbage would.

    CPython counts the depth of all threads' syntax trees in one place, and fails with SystemError
    where another one was made in between (gh-106905).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
