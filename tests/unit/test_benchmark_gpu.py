"""The GPU benchmark's own logic: what it resumes, how it falls back, what its table says."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.gpu import arms, run, windows
from benchmarks.gpu import measure as process
from benchmarks.gpu.documents import PAD, Documents, pad_documents
from benchmarks.gpu.runs import make_recipe
from benchmarks.gpu.table import render

FOREVER = float("inf")


def good(name, **changes):
    return {
        "arm": name, "rows": 16, "status": "ok", "device": "NVIDIA H200", "software": "torch 2.11",
        "tokens_per_second": 60_000.0, "positions_per_second": 60_060.0, "useful_flops": 4.1e14,
        "spread": [59_000, 60_000, 61_000], "peak": 70.0, "reserved": 75.0, "seconds": 50.0,
        **changes,
    }  # fmt: skip


def ceiling():
    return {
        "arm": "ceiling", "rows": 0, "status": "ok", "device": "NVIDIA H200",
        "software": "torch 2.11", "flops": 7.9e14, "products": {"8192 x 8192 x 8192": 7.9e14},
        "copy": 4.3e12, "seconds": 20.0,
    }  # fmt: skip


class Recorder:
    """Stands for the process of an arm: answers from a list, and notes what was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, arm, rows, seconds):
        self.asked.append((arm.name, rows))
        answer = self.answers.pop(0) if self.answers else {}
        return good(arm.name, rows=rows) | answer


def measure(folder, names, recorder, *, deadline=FOREVER, again=False):
    return run.measure_all(folder, names, recorder, deadline=deadline, again=again)


def test_an_arm_that_is_there_is_passed_over_and_the_table_grows_with_each(tmp_path):
    measure(tmp_path, ["1b-script"], Recorder())
    first = (tmp_path / "table.md").read_text()
    later = Recorder()
    assert measure(tmp_path, ["1b-script", "1b-sdpa"], later) == []
    assert later.asked == [("1b-sdpa", 16)]
    second = (tmp_path / "table.md").read_text()
    assert arms.ARMS["1b-sdpa"].title not in first
    assert arms.ARMS["1b-sdpa"].title in second


def test_a_result_that_a_kill_cut_is_measured_anew_and_spoils_no_other(tmp_path):
    measure(tmp_path, ["1b-script", "1b-sdpa"], Recorder())
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-40])
    again = Recorder()
    measure(tmp_path, ["1b-script", "1b-sdpa"], again)
    assert again.asked == [("1b-sdpa", 16)]
    assert {name: r["status"] for name, r in run.read_results(tmp_path).items()} == {
        "1b-script": "ok", "1b-sdpa": "ok",
    }  # fmt: skip


def test_a_failed_arm_is_a_line_with_its_reason_and_the_next_goes_on(tmp_path):
    broken = {"status": "failed", "reason": "RuntimeError: no kernel for this device"}
    recorder = Recorder(broken)
    measure(tmp_path, ["1b-varlen", "1b-head"], recorder)
    assert recorder.asked == [("1b-varlen", 16), ("1b-head", 16)]
    assert "| 16 rows | RuntimeError: no kernel" in (tmp_path / "table.md").read_text()
    later = Recorder()
    measure(tmp_path, ["1b-varlen"], later)
    assert later.asked == []
    measure(tmp_path, ["1b-varlen"], later, again=True)
    assert later.asked == [("1b-varlen", 16)]


def test_out_of_memory_halves_the_rows_until_they_fit_and_the_line_says_so(tmp_path):
    memory = {"status": "memory", "reason": "CUDA out of memory"}
    recorder = Recorder(memory, memory)
    measure(tmp_path, ["1b-sdpa"], recorder)
    assert recorder.asked == [("1b-sdpa", 16), ("1b-sdpa", 8), ("1b-sdpa", 4)]
    assert "4 x 2,048, 16 do not fit" in (tmp_path / "table.md").read_text()


def test_memory_that_never_suffices_ends_at_one_row(tmp_path):
    recorder = Recorder(*[{"status": "memory", "reason": "CUDA out of memory"}] * 9)
    measure(tmp_path, ["15b-sdpa"], recorder)
    assert [rows for _, rows in recorder.asked] == [4, 2, 1]
    assert "CUDA out of memory" in (tmp_path / "table.md").read_text()


def test_no_arm_begins_that_would_not_be_done_in_time_nor_any_after_it(tmp_path):
    recorder = Recorder()
    names = ["1b-sdpa", "1b-compile", "1b-fused"]
    seconds = arms.ARMS["1b-sdpa"].seconds + 20
    left = measure(tmp_path, names, recorder, deadline=time.monotonic() + seconds)
    assert [name for name, _ in recorder.asked] == ["1b-sdpa"]
    assert left == ["1b-compile", "1b-fused"]


def test_an_arm_that_the_end_of_the_time_cut_off_is_left_for_the_next_run(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    given = []

    def hang(arm, rows, seconds):
        given.append(seconds)
        clock[0] += seconds
        return {"arm": arm.name, "rows": rows, "status": "failed", "reason": "not done"}

    names = ["1b-sdpa", "1b-varlen"]
    assert measure(tmp_path, names, hang, deadline=100.0) == names
    assert given == [100.0]
    assert run.read_results(tmp_path) == {}
    clock[0] = 0.0
    assert measure(tmp_path, names, hang, deadline=600.0) == ["1b-varlen"]
    assert given == [100.0, run.LIMIT, 120.0]
    assert list(run.read_results(tmp_path)) == ["1b-sdpa"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED in cublasCreate"), "memory"),
        (RuntimeError("no kernel image is available"), "failed"),
    ],
)
def test_memory_that_is_lacking_is_told_from_other_failures_whoever_asked_for_it(
    monkeypatch, error, status
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(process, "versions", lambda _: {})
    monkeypatch.setattr(process, "measure_ceiling", fail)
    result = process.run("ceiling", 0, tiny=True)
    assert (result["status"], result["reason"]) == (status, f"{type(error).__name__}: {error}")


def test_a_run_is_opened_without_the_packages_of_the_data_stages():
    code = "import sys; sys.modules['loky'] = None; import pipelines.runs"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=run.ROOT)


def test_an_arm_that_hangs_is_killed_with_its_children_and_says_so(tmp_path, monkeypatch):
    started = []
    popen = run.subprocess.Popen

    def start(command, **options):
        assert f"--parent {os.getpid()}" in " ".join(command)  # or it outlives a kill -9
        process = popen(["sleep", "60"], **options)
        started.append(process)
        return process

    monkeypatch.setattr(run.subprocess, "Popen", start)
    result = run.in_process(tmp_path, dry_run=True)(arms.ARMS["1b-sdpa"], 16, 0.05)
    assert (result["status"], result["reason"]) == ("failed", "not done after 480 s")
    assert started[0].poll() is not None


def test_the_table_judges_the_best_line_of_each_model_by_the_bars():
    results = {
        "ceiling": ceiling(),
        "1b-script": good("1b-script", tokens_per_second=14_000.0, positions_per_second=37_000.0),
        "1b-sdpa": good("1b-sdpa", tokens_per_second=30_000.0),
        "1b-rows": good("1b-rows", tokens_per_second=63_000.0, useful_flops=4.345e14),
        "15b-fused": good("15b-fused", tokens_per_second=7_100.0, peak=111.0),
        "15b-checkpointing": good("15b-checkpointing", tokens_per_second=5_200.0, peak=60.0),
    }
    table = render(results)
    assert "| 55.0% |" in table  # 434.5 of 790 TFLOP/s
    assert "1B full, real tok/s: 63,000 (at least 57,000 wanted): met" in table
    assert "1B full, times the seed's script: 4.50 (at least 4 wanted): met" in table
    assert "15.5B LoRA, real tok/s at most 110 GiB: 5,200 (at least 6,900 wanted): missed" in table
    assert "Not measured: 1b-varlen" in table


def test_each_arm_changes_something_and_has_a_name_and_title_of_its_own():
    found = [arm for arm in arms.ARMS.values() if arm.loop == "bare"]
    assert len({arm.title for arm in found}) > len(found) - 3  # both models have some lines alike
    settings = [json.dumps({**asdict(arm), "name": "", "title": "", "seconds": 0}) for arm in found]
    assert len(set(settings)) == len(found)


def test_starloom_is_measured_as_it_is_and_with_its_own_key_for_torch_compile():
    plain, fast = (arms.ARMS[name] for name in ("1b-starloom", "1b-starloom-compile"))
    unlike = {"name", "title", "seconds", "compiled"}
    assert {key for key, value in asdict(plain).items() if asdict(fast)[key] != value} == unlike
    keys = [make_recipe(arm, on_cpu=False).training.torch_compile for arm in (plain, fast)]
    assert keys == [False, True]


@pytest.fixture(scope="module")
def documents():
    return Documents.draw(12_000, 2048, 49_152)


def test_documents_have_the_lengths_of_function_and_docstring_pairs(documents):
    lengths = documents.lengths
    batches = lengths.reshape(-1, 8)
    assert lengths.mean() == pytest.approx(336, rel=0.03)
    assert lengths.sum() / (batches.max(1).sum() * 8) == pytest.approx(0.38, abs=0.01)
    assert lengths.mean() / 2048 == pytest.approx(0.16, abs=0.01)
    assert documents.token_weighted == pytest.approx(640, rel=0.05)


def test_rows_hold_every_document_once_and_whole_and_are_full():
    documents = Documents.draw(1_000, 2048, 49_152)
    rows = documents.rows()
    sizes = [len(row.input_ids) for row in rows]
    assert sum(sizes) == documents.lengths.sum()
    assert max(sizes) <= 2048
    assert sum(sizes) / (2048 * len(rows)) > 0.99
    assert sorted(int(n) for row in rows for n in row.lengths) == sorted(documents.lengths)
    assert all(row.input_ids.min() >= 19 and row.input_ids.max() < 49_152 for row in rows)
    first = rows[0].input_ids[: rows[0].lengths[0]]
    same = [n for n in np.flatnonzero(documents.lengths == len(first))
            if (documents.ids(n) == first).all()]  # fmt: skip
    assert len(same) == 1


def test_padded_batches_mask_what_is_padded():
    batch = pad_documents([np.array([20, 21, 22]), np.array([30])])
    assert batch["input_ids"].tolist() == [[20, 21, 22], [30, PAD, PAD]]
    assert batch["labels"].tolist() == [[20, 21, 22], [30, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_windows_leave_out_the_warm_up_and_the_step_that_sizes_them(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(windows.time, "perf_counter", lambda: clock[0])
    measured = windows.Windows(lambda: None, warmup=2, repeats=3, seconds=4.0, _began=0.0)
    durations = [50.0, 1.0, 2.0, *[2.0, 2.0], *[1.0, 1.0], *[4.0, 4.0]]
    finished = []
    for duration in durations:
        clock[0] += duration
        measured.add(100, 120, 1000)
        finished.append(measured.step())
    assert finished == [False] * 8 + [True]
    assert [(w.steps, w.seconds, w.tokens) for w in measured.found] == [
        (2, 4.0, 200), (2, 2.0, 200), (2, 8.0, 200),
    ]  # fmt: skip
    assert measured.rate(lambda w: w.tokens) == 50.0
    assert measured.warmup_seconds == 51.0
