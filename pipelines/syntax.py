"""Parses Python source to the same verdict wherever it is called from."""

import ast
import threading
import warnings

# Warning filters belong to the whole process; parsing holds the interpreter's lock anyway.
_filters = threading.Lock()


class BadSyntax(ValueError):
    """Source that Python cannot parse; `reason` is "does_not_parse" or "too_deep"."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_python(source: str) -> ast.Module:
    """Return the syntax tree of a decoded source; raises BadSyntax.

    How deep source may nest depends on the stack that is left, so every parse gets a thread, hence
    a stack, of its own: else a file could parse in a pool process and fail in the main one.
    """
    found: list[ast.Module | BadSyntax] = []
    thread = threading.Thread(target=lambda: found.append(_parse(source)), name="parse")
    thread.start()
    thread.join()
    if isinstance(found[0], BadSyntax):
        raise found[0]
    return found[0]


def _parse(source: str) -> ast.Module | BadSyntax:
    try:
        with _filters, warnings.catch_warnings():
            # With `python -W error` an invalid escape would turn into a syntax error.
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except SyntaxError as error:
        return BadSyntax("does_not_parse", f"line {error.lineno}: {error.msg}")
    except (RecursionError, MemoryError) as error:
        return BadSyntax("too_deep", str(error) or "the parser's stack overflowed")
    except ValueError as error:
        return BadSyntax("does_not_parse", str(error))
