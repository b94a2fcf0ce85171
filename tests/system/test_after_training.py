"""After training: what is saved gives the same logits, loads in a fresh process, and is pushed."""

import json
import subprocess
import sys
import time
from itertools import product

import psutil
import pytest

from pipelines.errors import TrainingError
from pipelines.prefer import prefer
from pipelines.runs import find_run
from pipelines.serve.generate import generate
from pipelines.settings.preference import Preference
from pipelines.training.reload import check_saved
from tests.assets.finished_runs import make_finished_run, make_records
from tests.assets.tiny_models import KINDS, SHAPES, check_merged, write_base_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("model_type", "tied", "kind"), list(product(sorted(SHAPES), (True, False), KINDS))
)
def test_the_merged_model_is_the_base_with_its_adapter(tmp_path, model_type, tied, kind):
    base = write_base_model(tmp_path / "base", model_type, tied=tied)
    check_merged(base, tmp_path, kind)


def test_a_trained_model_writes_in_a_fresh_process_and_a_broken_one_is_left_where_it_is(tmp_path):
    run, _ = make_finished_run(tmp_path, steps=5)
    found = check_saved(run)

    assert (found["stop_ids"], run.read("reload.json")) == ([0], found)
    assert 1 <= len(found["ids"]) <= 8
    weights = run.model / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    (run.path / "reload.json").unlink()
    with pytest.raises(TrainingError) as error:
        check_saved(run)
    text = str(error.value)
    assert text.startswith(f"run {run.name}: the saved model cannot be used: it does not load")
    assert f"its files are left in {run.model}" in text
    assert "\n" not in text
    assert weights.exists()
    assert run.read("reload.json") is None


@pytest.fixture
def run_with_pairs(tmp_path):
    """A trained run each of whose records has a worse answer."""
    records = [
        {**record, "meta": json.dumps({"rejected": {"text": "six seven"}})}
        for record in make_records()
    ]
    return make_finished_run(tmp_path, records=records, steps=40)


SETTINGS = Preference(learning_rate=1e-2, max_steps=6, gradient_accumulation_steps=1)


def test_the_better_answers_gain_on_held_out_pairs_and_the_result_generates(run_with_pairs):
    pytest.importorskip("trl", reason="the extra trl is not installed")
    run, store = run_with_pairs

    result = prefer(run, store, SETTINGS)

    assert result["pairs"] == 14
    assert result["accepted"], result["reason"]
    assert result["held_out"]["pairs"] == 3
    assert result["held_out"]["reward_margin"] > 0
    assert result["reload"]["stop_ids"] == [0]
    assert prefer(run, store, SETTINGS) == result
    preferred = find_run(run.path.parent, f"{run.name}/preferred")
    assert isinstance(generate(preferred, "count to 1", max_new_tokens=4), str)


def test_a_killed_preference_stage_leaves_no_process_and_no_half_of_a_model(run_with_pairs):
    pytest.importorskip("trl", reason="the extra trl is not installed")
    run, store = run_with_pairs
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(run.path), str(store.root)], stderr=subprocess.DEVNULL
    )
    wait_until((run.path / "prefer.jsonl").exists)
    starter.kill()
    starter.wait()
    wait_until(lambda: not processes_of(run))

    assert not run.preferred().trained
    assert run.read("preferred.json") is None
    assert prefer(run, store, SETTINGS)["accepted"]
    assert not list(run.path.glob("preferred.tmp-*"))


STARTER = """
import sys
from pathlib import Path
from pipelines.settings.preference import Preference
from pipelines.prefer import prefer
from pipelines.runs import Run
from pipelines.store import Store
prefer(Run(Path(sys.argv[1])), Store(Path(sys.argv[2])), Preference(max_steps=5000))
"""


def processes_of(run):
    everything = psutil.process_iter(["cmdline"])
    return [p.pid for p in everything if str(run.path) in " ".join(p.info["cmdline"] or ())]


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
