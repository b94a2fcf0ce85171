"""The house's rules: flows -> tasks -> pipelines, light imports, sizes, no mutual packages."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted(p for top in ("flows", "tasks", "pipelines") for p in (ROOT / top).rglob("*.py"))
TOP_LEVEL = {
    "flows", "tasks", "pipelines", "data", "tests", "benchmarks", "docs", "prefect.yaml",
    "prefect.toml", "pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE",
    "Makefile",
}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_top_level_is_exactly_the_agreed_one():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()

    found = {name.split("/")[0] for name in listed}

    assert {name for name in found if not name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    layer = path.relative_to(ROOT).parts[0]
    above = {
        "pipelines": {"prefect", "tasks", "flows"},
        "tasks": {"flows"},
        "flows": set(),
    }[layer]

    assert {name.split(".")[0] for name in imported(path)} & above == set()


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_functions_and_docstrings_keep_to_their_sizes(path):
    text = path.read_text()
    tree = ast.parse(text)
    long = [
        f"{node.name}: {node.end_lineno - node.lineno} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno > 60
    ]

    assert len(text.splitlines()) <= 400
    assert long == []
    assert not text.strip() or ast.get_docstring(tree)
    assert path.stem not in {"utils", "util", "helpers", "helper", "common", "manager", "base"}


def test_no_two_packages_of_pipelines_import_each_other():
    arrows = defaultdict(set)
    for path in (ROOT / "pipelines").rglob("*.py"):
        parts = path.relative_to(ROOT / "pipelines").parts
        package = parts[0] if len(parts) > 1 else "."
        for name in imported(path):
            target = name.split(".")
            if target[0] == "pipelines" and len(target) > 1:
                inner = (ROOT / "pipelines" / target[1]).is_dir()
                arrows[package].add(target[1] if inner else ".")
    mutual = {
        (a, b) for a in arrows for b in arrows[a] if a < b and a != "." and a in arrows.get(b, ())
    }

    assert mutual == set()
    assert arrows["sources"] <= {".", "sources", "settings", "spiders"}
    assert arrows["settings"] <= {".", "settings"}
    assert "sources" not in arrows["render"] | arrows["training"]


def test_importing_a_flow_or_the_command_line_loads_nothing_heavy():
    heavy = "torch transformers datasets deepspeed peft scrapy fasttext matplotlib sklearn".split()
    modules = sorted(f"flows.{p.stem}" for p in (ROOT / "flows").glob("*.py") if p.stem[0] != "_")
    code = (
        f"import importlib, sys\nfor m in {[*modules, 'pipelines.cli', 'pipelines.local']!r}:\n"
        f"    importlib.import_module(m)\nprint([m for m in {heavy!r} if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout.strip(), done.stderr[-500:]) == (0, "[]", "")
    assert {"flows.finetune", "flows.prepare", "flows.refresh"} <= set(modules)
