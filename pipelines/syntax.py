"""Parses Python source to the same verdict wherever it is called from."""

import ast
import symtable
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

Parsed = TypeVar("Parsed")

# Warning filters belong to the whole process; parsing holds the interpreter's lock anyway.
_filters = threading.Lock()


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
    """Return what a parser makes of its source.

    How deep source may nest depends on the stack that is left, so every parse gets a thread, hence
    a stack, of its own: else a file could parse in a pool process and fail in the main one.
    """
    found: list[Parsed | BadSyntax] = []
    thread = threading.Thread(target=lambda: found.append(_try(parse)), name="parse")
    thread.start()
    thread.join()
    [result] = found
    if isinstance(result, BadSyntax):
        raise result
    return result


def _try(parse: Callable[[], Parsed]) -> Parsed | BadSyntax:
    try:
        with _filters, warnings.catch_warnings():
            # With `python -W error` an invalid escape would turn into a syntax error.
            warnings.simplefilter("ignore")
            return parse()
    except SyntaxError as error:
        return BadSyntax("does_not_parse", f"line {error.lineno}: {error.msg}")
    except (RecursionError, MemoryError) as error:
        return BadSyntax("too_deep", str(error) or "the parser's stack overflowed")
    except ValueError as error:
        return BadSyntax("does_not_parse", str(error))
