"""What a terminal shows of trainings that run elsewhere."""

import itertools
import json
import threading

from pipelines import follow
from pipelines.follow import describe
from pipelines.jsonlines import read_new

TRAIN = {"step": 4, "max_steps": 8, "loss": 5.25, "tokens_per_second": 2900.4}
EVAL = {"step": 4, "eval_loss": 5.5, "eval_tokens": 10}


def test_lines_are_read_whole_and_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(TRAIN) + "\n" + '{"step": 8, "lo')

    lines, place = read_new(path, 0)
    assert lines == [TRAIN]
    assert read_new(path, place) == ([], place)
    path.write_text("")  # a resume cut it back
    assert read_new(path, place) == ([], 0)


def test_lines_say_step_loss_and_speed():
    assert describe(TRAIN) == "step 4 of 8: loss 5.250, 2,900 tokens/s"
    assert describe(TRAIN | {"mfu": 0.512}).endswith("2,900 tokens/s, MFU 51%")
    assert describe(EVAL) == "step 4: validation loss 5.500"


def test_only_what_is_written_from_now_on_is_shown_and_the_last_step_always(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    old = tmp_path / "old-1" / "metrics.jsonl"
    old.parent.mkdir()
    old.write_text(json.dumps(TRAIN) + "\n")
    new = tmp_path / "new-2" / "metrics.jsonl"

    def train():
        new.parent.mkdir()
        rows = [EVAL, TRAIN | {"step": 5}, TRAIN | {"step": 8}]
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))

    started = follow.follow(tmp_path)
    timer = threading.Timer(0.05, train)
    timer.start()
    shown = list(itertools.islice(started, 2))
    timer.join()

    assert shown == [
        "new-2: step 4: validation loss 5.500",
        "new-2: step 8 of 8: loss 5.250, 2,900 tokens/s",
    ]
