"""The loss and gradient of a step do not depend on how its rows are spread over the machine."""

import pytest

from pipelines.jsonlines import read_lines
from pipelines.training.launch import launch
from tests.assets.training_runs import make_recipe, make_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

# The 40 rows of the train split in one step: rows per batch, batches per step, ranks, strategy.
LAYOUTS = {
    "one batch": (40, 1, 1, "ddp"),
    "row by row": (1, 40, 1, "ddp"),
    "accumulated": (10, 4, 1, "ddp"),
    "last window and last batch partial": (6, 9, 1, "ddp"),
    "DDP": (20, 1, 2, "ddp"),
    "DDP, row by row": (1, 20, 2, "ddp"),
    "ZeRO-2": (5, 4, 2, "zero2"),
    "ZeRO-3": (5, 4, 2, "zero3"),
}
ADAPTED = ("one batch", "DDP", "ZeRO-2", "ZeRO-3")
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}


def first_step(folder, name, **overrides):
    batch, accumulation, ranks, strategy = LAYOUTS[name]
    recipe = make_recipe(
        training__max_steps=1,
        training__warmup_steps=0,  # an adapter that learned nothing is not saved
        training__logging_steps=1,
        training__per_device_train_batch_size=batch,
        training__gradient_accumulation_steps=accumulation,
        **overrides,
    )
    run, store = make_run(folder, recipe, processes_per_node=ranks, strategy=strategy)
    launch(run, store)
    (line,) = [x for x in read_lines(run.path / "metrics.jsonl") if "loss" in x]
    return line["loss"], line["grad_norm"], line["tokens"]


@pytest.mark.parametrize(
    ("names", "overrides"),
    [
        (tuple(LAYOUTS), {}),
        (ADAPTED, {"adapter": ADAPTER}),
        (("accumulated", "ZeRO-3"), {"model__head_loss": "chunked"}),
        (("accumulated", "ZeRO-3"), {"model__head_loss": "dense"}),
    ],
    ids=["full", "LoRA", "chunked", "dense"],
)
def test_every_layout_has_the_same_loss_and_gradient_norm(tmp_path, names, overrides):
    found = {
        name: first_step(tmp_path / str(number), name, **overrides)
        for number, name in enumerate(names)
    }

    expected = found[names[0]]
    assert {
        name: step for name, step in found.items() if step != pytest.approx(expected, abs=1e-4)
    } == {}
