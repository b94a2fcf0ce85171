"""Crash injection: whatever system call a builder dies at, the store never shows half a stage."""

import contextlib
import os
from pathlib import Path

import pytest

from pipelines.engine import Built, Job, Outcome
from pipelines.manifest import Counts
from pipelines.store import StageSpec, Store

SPEC = StageSpec("stage", params={"rows": 2}, code="c0de")
CALLS = [(os, "fsync"), (Path, "replace"), (Path, "write_text"), (Path, "unlink")]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing but `finally` could see it, and nothing of ours may need to."""


def build(work):
    def write(inputs, output, params):
        output.write_text(f"{output.name.split('.')[1]}\n" * 2)
        return Outcome(Counts(rows_in=2, rows_out=2, used=2))

    return Built(work.map(write, [Job(f"rows-{i}.txt", ()) for i in range(3)], {}))


def die_at(monkeypatch, call_number):
    """Make the n-th of the watched calls raise before it does anything; return the counter."""
    count = [0]

    def watched(original):
        def call(*arguments, **options):
            count[0] += 1
            if count[0] == call_number:
                raise KilledError
            return original(*arguments, **options)

        return call

    for owner, name in CALLS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return count


def count_calls(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = die_at(monkeypatch, -1)
        digest = Store(tmp_path).build(SPEC, build).digest
    return count[0], digest


def test_a_crash_at_any_call_leaves_nothing_half_done_and_the_next_build_is_identical(tmp_path):
    num_calls, digest = count_calls(tmp_path / "undisturbed")
    assert num_calls > 15

    for call_number in range(1, num_calls + 1):
        root = tmp_path / f"crash-{call_number}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            die_at(monkeypatch, call_number)
            with pytest.raises(KilledError):
                Store(root).build(SPEC, build)

        found = Store(root).find(SPEC)
        assert found is None or found.digest == digest, f"call {call_number}"
        assert Store(root).build(SPEC, build).digest == digest, f"call {call_number}"
        assert Store(root).verify() == {}
        assert [p.name for p in (root / "stage").iterdir() if p.is_dir()] == [SPEC.key[:16]]


def test_two_crashes_in_a_row_are_no_worse_than_one(tmp_path):
    num_calls, digest = count_calls(tmp_path / "undisturbed")

    for first in range(1, num_calls, 3):
        for second in range(1, num_calls, 4):
            root = tmp_path / f"crash-{first}-{second}"
            for call_number in (first, second):
                with pytest.MonkeyPatch.context() as monkeypatch:
                    die_at(monkeypatch, call_number)
                    with contextlib.suppress(KilledError):
                        Store(root).build(SPEC, build)
            assert Store(root).build(SPEC, build).digest == digest, (first, second)
