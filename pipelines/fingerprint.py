"""The code digest of a stage: what its module and everything it imports from here compute.

Comments, docstrings and layout do not count, so editing them rebuilds nothing. The frame that
moves files around (store, engine, manifest) is left out: it cannot change what a shard holds
without a change of format, which FORMAT counts; so are pictures of what was measured.
"""

import ast
import functools
import hashlib
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pipelines.syntax import parse_python

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent
FRAME = frozenset(
    {
        "pipelines.engine",
        "pipelines.errors",
        "pipelines.fingerprint",
        "pipelines.manifest",
        "pipelines.overrides",
        "pipelines.plan",
        "pipelines.recipe",
        "pipelines.runs",
        "pipelines.smoke_template",
        "pipelines.sources.fetch",
        "pipelines.store",
        "pipelines.training.plots",
    }
)

# Settings enter a key by value, and what spiders fetch by its bytes.
FRAME_PACKAGES = ("pipelines.settings", "pipelines.spiders")


def code_digest(*modules: str) -> str:
    """Return the digest over modules and their transitive imports inside `pipelines`."""
    parts = [f"{name}:{_module_digest(name)}" for name in sorted(reachable(*modules))]
    return hashlib.sha256("\n".join([f"format {FORMAT}", *parts]).encode()).hexdigest()


def reachable(*modules: str) -> set[str]:
    """Return the modules and all they import inside `pipelines`, the frame excepted."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in found and name not in FRAME and not name.startswith(FRAME_PACKAGES):
            found.add(name)
            todo.extend(_imports(name))
    return found


@functools.cache
def _parse(name: str) -> ast.Module:
    return parse_python(_path(name).read_text(encoding="utf-8"))


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and its statements at every depth: expressions hold none."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo.extend(getattr(node, field, ()))


def _path(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _imports(name: str) -> tuple[str, ...]:
    found = []
    for node in _statements(_parse(name)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(m for m in found if m.startswith("pipelines.") and _path(m).exists())


@functools.cache
def _module_digest(name: str) -> str:
    tree = _parse(name)
    for node in _statements(tree):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    text = ast.dump(tree, include_attributes=False)
    # `_parse` is cached: restore nothing, the stripped tree is good for imports as well.
    return hashlib.sha256(text.encode()).hexdigest()


def versions(*distributions: str) -> dict[str, str]:
    """Return the installed versions of distributions whose behavior a stage's bytes depend on."""
    return {name: metadata.version(name) for name in distributions}


@functools.cache
def git_sha() -> str:
    """Return the checkout's commit, with "+" when the tree is changed; "" outside git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    sha = git("rev-parse", "--short=12", "HEAD")
    return f"{sha}+" if sha and git("status", "--porcelain", "--untracked-files=no") else sha
