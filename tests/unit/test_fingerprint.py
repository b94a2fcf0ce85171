"""Code digests change with what code computes and with nothing else."""

import ast

import pytest

from pipelines import fingerprint
from pipelines.plan import STAGES
from pipelines.runs import EVALUATOR, TRAINER


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package of two modules in which `main` imports `part` inside a function."""
    folder = tmp_path / "pipelines"
    folder.mkdir()
    (folder / "part.py").write_text('"""Part."""\nVALUE = 1\n')
    (folder / "main.py").write_text(
        "def f():\n    from pipelines import part\n    return part.VALUE\n"
    )
    (folder / "other.py").write_text("X = 1\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)

    def digest():
        for cached in (fingerprint._parse, fingerprint._imports, fingerprint._module_digest):
            cached.cache_clear()
        return fingerprint.code_digest("pipelines.main")

    yield folder, digest
    monkeypatch.undo()
    digest_caches = (fingerprint._parse, fingerprint._imports, fingerprint._module_digest)
    for cached in digest_caches:
        cached.cache_clear()


def test_comments_docstrings_and_unrelated_modules_change_nothing(package):
    folder, digest = package
    before = digest()
    (folder / "part.py").write_text('"""Another docstring."""\n# why\nVALUE   =   1\n')
    (folder / "other.py").write_text("X = 2\n")

    assert digest() == before


def test_a_change_in_an_imported_module_changes_the_digest(package):
    folder, digest = package
    before = digest()
    (folder / "part.py").write_text("VALUE = 2\n")

    assert digest() != before


@pytest.mark.parametrize("module", [*(stage.module for stage in STAGES), TRAINER, EVALUATOR])
def test_every_stage_and_entry_point_exists_and_has_a_digest(module):
    assert len(fingerprint.code_digest(module)) == 64
    assert ast.get_docstring(fingerprint._parse(module)) is None  # stripped: it does not count
