"""Notebooks as text: the cells in order in the percent format, without outputs.

The format is that of Jupytext and of editors: `# %%` begins a code cell, `# %% [markdown]` one of
prose, whose lines are comments.
"""

import json
from typing import Any

from pipelines.sources.code_files import Unusable

SUFFIX = ".ipynb"


def flatten_notebook(text: str) -> str:
    r"""Return a notebook's cells as one text; raises Unusable for what is no notebook.

    >>> flatten_notebook('{"cells": [{"cell_type": "markdown", "source": ["# Sum\\n", "of it"]},'
    ...                  ' {"cell_type": "code", "source": "1 + 1"}]}')
    '# %% [markdown]\n# # Sum\n# of it\n\n# %%\n1 + 1\n'
    """
    try:
        cells = _cells(json.loads(text))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise Unusable("no_notebook", str(error)[:200]) from error
    parts = []
    for kind, source in cells:
        if not source.strip():
            continue
        if kind == "code":
            parts.append(f"# %%\n{source.rstrip()}\n")
        elif kind == "markdown":
            lines = (f"# {line}".rstrip() for line in source.rstrip().split("\n"))
            parts.append("# %% [markdown]\n" + "\n".join(lines) + "\n")
    if not parts:
        raise Unusable("empty")
    return "\n".join(parts)


def _cells(notebook: Any) -> list[tuple[str, str]]:
    """Return (type, source) of every cell of a notebook of format 3 or 4."""
    if not isinstance(notebook, dict):
        raise TypeError("the file holds no JSON object")
    found = notebook.get("cells")
    if found is None:
        sheets = notebook.get("worksheets") or [{}]
        found = sheets[0].get("cells") if isinstance(sheets[0], dict) else None
    if not isinstance(found, list):
        raise TypeError("the object has no list of cells")
    cells = []
    for cell in found:
        if not isinstance(cell, dict):
            raise TypeError("a cell is no object")
        source = cell.get("source", cell.get("input", ""))
        lines: list[Any] = source if isinstance(source, list) else [source]
        if not all(isinstance(line, str) for line in lines):
            raise TypeError("a cell's source is no text")
        cells.append((str(cell.get("cell_type")), "".join(lines)))
    return cells
