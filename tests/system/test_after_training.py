"""After training: what is saved gives the same logits, loads in a fresh process, and is pushed."""

from itertools import product

import pytest

from pipelines.errors import TrainingError
from pipelines.training.reload import check_saved
from tests.assets.finished_runs import make_finished_run
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
