"""The meter's lines, the picture made of them, and what a rank does on SIGTERM."""

import json
import os
import signal
import struct
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.errors import DiskFull, TrainingError
from pipelines.jsonlines import read_lines
from pipelines.training import callbacks
from pipelines.training.callbacks import (
    Local,
    Meter,
    StepAgreement,
    sum_over_ranks,
)
from pipelines.training.collate import Collator, PackedRow
from pipelines.training.flops import Flops, Speed
from pipelines.training.loss import validation_rows
from pipelines.training.plots import draw_loss, smooth
from pipelines.training.progress import StepCounts


def step(meter, number, loss=None, max_steps=9):
    meter.finish_step(StepCounts(10 * number, float(number), number, positions=20 * number))
    logs = {"loss": loss or 1.0 / number, "learning_rate": 0.1, "grad_norm": 2.0}
    meter.trained(number, max_steps, logs)


def lines(path):
    clock = ("seconds", "tokens_per_second", "data_wait_share", "peak_rss")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(path)]


def test_a_line_is_the_mean_over_its_window_and_the_last_step_always_has_one(tmp_path):
    meter = Meter(tmp_path / "metrics.jsonl", logging_steps=2)
    meter.evaluated(0, 5.0, 77)
    for number in (1, 2, 3):
        step(meter, number, max_steps=3)

    rates = {"max_steps": 3, "learning_rate": 0.1, "grad_norm": 2.0, "padding_share": 0.5}
    rates |= {"mfu": None, "hfu": None, "peak_gpu_memory": 0}
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "eval_loss": 5.0, "eval_tokens": 77},
        {"step": 2, "loss": 0.75, "tokens": 30, **rates},
        {"step": 3, "loss": 1 / 3, "tokens": 60, **rates},
    ]
    assert meter.progress.loss_sum == 1 + 1 / 2 + 1 / 3
    assert (meter.progress.cpu_seconds, meter.progress.peak_rss) == (3.0, 3)


@pytest.mark.parametrize("stop_at", range(9))
def test_a_resumed_meter_writes_what_an_undisturbed_one_writes(tmp_path, stop_at):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    meter = Meter(whole, logging_steps=3)
    meter.evaluated(0, 5.0, 7)
    for number in range(1, 10):
        step(meter, number)

    killed = Meter(cut, logging_steps=3)
    killed.evaluated(0, 5.0, 7)
    saved = json.dumps(killed.state())
    for number in range(1, 9):
        step(killed, number)
        if number == stop_at:
            saved = json.dumps(killed.state())
    with cut.open("a") as file:
        file.write('{"step": 9, "lo')
    resumed = Meter(cut, logging_steps=3)
    resumed.start(stop_at, json.loads(saved))
    for number in range(stop_at + 1, 10):
        step(resumed, number)

    assert lines(cut) == lines(whole)
    assert resumed.progress.loss_sum == meter.progress.loss_sum
    assert resumed.progress.tokens == meter.progress.tokens


def test_a_run_without_a_checkpoint_starts_with_empty_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval_loss": 3.0, "eval_tokens": 1}\n{"step": 2, "loss": 1}\n')

    Meter(path, 1).start(-1, {})

    assert path.read_text() == ""


def test_cost_adds_up_over_attempts_and_memory_does_not(tmp_path):
    meter = Meter(tmp_path / "metrics.jsonl", 1)
    meter.start(4, {"seconds": 100.0, "cpu_seconds": 50.0, "peak_rss": 900, "loss_sum": 8.0})

    step(meter, 5)

    assert meter.state()["seconds"] >= 100
    assert (meter.progress.cpu_seconds, meter.progress.peak_rss) == (55.0, 900)


@pytest.mark.parametrize(
    "logs",
    [
        {"loss": float("nan"), "grad_norm": 1.0},
        {"loss": 1.0, "grad_norm": float("inf")},
        {"loss": float("inf")},
    ],
)
def test_a_loss_or_gradient_that_is_no_number_stops_every_rank(logs):
    meter = Meter(None, 1)
    meter.finish_step(StepCounts(1))
    with pytest.raises(TrainingError, match=r"step 3: loss .* Lower training\.learning_rate"):
        meter.trained(3, 9, {**logs, "learning_rate": 0.1})


def test_only_the_rank_with_a_path_writes(tmp_path):
    meter = Meter(None, 1)
    step(meter, 1)
    meter.evaluated(1, 1.0, 1)
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_sigterm_ends_training_after_the_step_with_a_checkpoint():
    meter = Meter(None, 1)
    before = signal.getsignal(signal.SIGTERM)
    agreement = StepAgreement(meter, torch.device("cpu"))
    state = SimpleNamespace(global_step=3, max_steps=9)
    try:
        agreement.on_train_begin()
        meter.local.tokens = 12
        free = SimpleNamespace(should_save=False, should_training_stop=False)
        agreement.on_step_end(None, state, free)
        os.kill(os.getpid(), signal.SIGTERM)
        stopped = SimpleNamespace(should_save=False, should_training_stop=False)
        agreement.on_step_end(None, state, stopped)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert (free.should_save, free.should_training_stop) == (False, False)
    assert (stopped.should_save, stopped.should_training_stop) == (True, True)
    assert meter.progress.tokens == 12


def test_the_last_step_is_always_evaluated():
    agreement = StepAgreement(Meter(None, 1), torch.device("cpu"))
    asked = []
    for number in (8, 9):
        control = SimpleNamespace(should_evaluate=False)
        agreement.on_step_end(None, SimpleNamespace(global_step=number, max_steps=9), control)
        asked.append(control.should_evaluate)

    assert asked == [False, True]


def test_one_process_alone_is_its_own_sum():
    assert sum_over_ranks([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (9, 9), (60, 60), (61, 60), (5000, 60)])
def test_validation_takes_at_most_60_different_rows_spread_over_the_split(size, count):
    rows = validation_rows(size)

    assert len(rows) == len(set(rows)) == count
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] >= size - 1 - size // count


def test_the_picture_has_its_size_for_every_kind_of_metrics(tmp_path):
    train = [{"step": s, "loss": 5 - s / 10} for s in range(1, 20)]
    held_out = [{"step": s, "eval_loss": 5 - s / 12, "eval_tokens": 9} for s in (0, 10, 20)]
    for name, metrics in (("both", train + held_out), ("train", train), ("none", [])):
        path = tmp_path / f"{name}.png"
        draw_loss(metrics, "quickstart: loss", path)
        header = path.read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", header[16:24]) == (1200, 700)


def test_the_smooth_curve_starts_at_the_first_value_and_stays_within_the_range():
    assert smooth([]) == []
    assert smooth([3.0]) == [pytest.approx(3.0)]
    values = [5.0, 1.0, 4.0, 2.0]
    assert smooth(values)[0] == pytest.approx(5.0)
    assert all(min(values) <= value <= max(values) for value in smooth(values))


def test_a_line_says_how_much_was_padding_waiting_and_utilised(tmp_path):
    flops = Flops(per_token=100, per_pair=2, recomputed_per_token=50)
    meter = Meter(tmp_path / "metrics.jsonl", 1, Speed(flops, 1e6))
    counts = StepCounts(60, 1.0, 7, positions=80, pairs=900, wait=0.0, peak_gpu_memory=5)
    meter.finish_step(counts)
    meter.progress.window_seconds, meter.progress.window_wait = 0.5, 0.125

    line = meter.trained(1, 1, {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 0.1})

    assert line == read_lines(meter.path)[0]
    assert {key: line[key] for key in ("padding_share", "data_wait_share", "mfu", "hfu")} == {
        "padding_share": 0.25, "data_wait_share": 0.25, "mfu": 0.0156, "hfu": 0.0216,
    }  # fmt: skip
    assert line["tokens_per_second"] == 120.0
    assert (line["peak_rss"], line["peak_gpu_memory"]) == (7, 5)


@pytest.mark.parametrize("flat", [False, True])
def test_real_tokens_and_attended_pairs_are_counted_from_any_batch(flat):
    rows = [PackedRow(*(np.array(x) for x in row)) for row in (
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [3, 2]), ([5, 6], [5, 6], [2]),
    )]  # fmt: skip
    meter = Meter(None, 1)

    meter.count([Collator(0, flat=flat)(rows), Collator(0, flat=flat)(rows[1:])], 0)
    meter.count([], 0)

    pairs = (3 * 4 + 2 * 3 + 2 * 3) // 2 + 3
    assert asdict(meter.take_local()) == {
        "tokens": 9, "positions": 9 if flat else 12, "pairs": pairs, "wait": 0.0,
    }  # fmt: skip
    assert asdict(meter.local) == asdict(Local())


def test_waiting_is_the_time_until_batches_are_there():
    meter = Meter(None, 1)

    def slow():
        for number in range(2):
            time.sleep(0.03)
            yield number

    assert list(meter.timed(slow())) == [0, 1]
    assert 0.06 <= meter.take_local().wait < 5


def test_metrics_on_a_full_disk_end_training_with_one_line_and_keep_the_checkpoint():
    meter = Meter(Path("/dev/full"), 1)

    with pytest.raises(DiskFull, match="/dev/full: no space left .* checkpoint is kept"):
        meter.evaluated(0, 5.0, 7)


def test_every_rank_learns_the_same_counts(monkeypatch):
    meter = Meter(None, 1)
    agreement = StepAgreement(meter, torch.device("cpu"))
    ranks = [
        [0.0, 10, 12, 50, 0.5, 2.0, 100, 7, 30.0],
        [1.0, 20, 24, 60, 0.3, 3.0, 200, 9, 10.0],
    ]
    monkeypatch.setattr(callbacks, "gather_over_ranks", lambda *_: ranks)

    assert agreement._exchange() == (1.0, StepCounts(30, 5.0, 300, 36, 110, 0.4, 9), 30.0)
