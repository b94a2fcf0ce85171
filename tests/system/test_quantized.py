"""Adapters over 4 and 8 bit bases on CPU: real ranks, killed, resumed, merged."""

import random

import pytest
from safetensors import safe_open

from pipelines.jsonlines import read_lines
from pipelines.training.collate import PackedDataset
from pipelines.training.launch import launch
from pipelines.training.loss import evaluate_loss
from pipelines.training.models import load_trained
from pipelines.training.reload import check_saved
from tests.assets.tiny_models import NEW_TOKENS, write_base_model
from tests.assets.training_runs import make_recipe, make_run
from tests.system.test_resume import STEPS, TWO, recipe_of, train
from tests.system.test_training import outcome, processes_of

pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

BITS = {4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}


def model_of(base, bits, dtype, **settings):
    quantized = {"model_name_or_path": str(base), "quantization_config": BITS[bits]}
    return quantized | {"dtype": dtype} | settings


@pytest.mark.parametrize(
    ("bits", "dtype", "layout"),
    [
        (4, "bfloat16", {"strategy": "ddp", **TWO}),
        (4, "float32", {"strategy": "zero2", **TWO}),
        (8, "float32", {"strategy": "ddp", **TWO}),
        (8, "bfloat16", {"strategy": "zero2", **TWO}),
    ],
    ids=["4-ddp", "4-zero2", "8-ddp", "8-zero2"],
)
def test_kills_change_no_loss_no_norm_and_no_weight(bits, dtype, layout, tmp_path):
    rng = random.Random(f"kills of {bits} {layout}")
    kills = [rng.randrange(4, 9), rng.randrange(11, 17)]
    recipe = recipe_of(
        tmp_path,
        "ddp-lora",
        model=model_of(tmp_path / "base", bits, dtype, dropout=0.1),
        training__gradient_checkpointing=True,
        training__neftune_noise_alpha=5.0,
    )

    whole = train(tmp_path / "whole", recipe, **layout)
    killed = train(tmp_path / "killed", recipe, kills, rng, **layout)

    losses = [line["loss"] for line in read_lines(whole.path / "metrics.jsonl") if "loss" in line]
    assert len(set(losses)) == STEPS
    assert outcome(killed) == outcome(whole), f"killed at {kills}"
    assert processes_of(killed) == []


@pytest.mark.parametrize(("bits", "model_type"), [(4, "llama"), (8, "gpt_bigcode"), (4, "qwen2")])
def test_two_ranks_train_as_one_and_save_the_model_that_they_evaluated(bits, model_type, tmp_path):
    base = write_base_model(tmp_path / "base", model_type)

    def trained(name, processes, batch):
        recipe = make_recipe(
            model=model_of(base, bits, "float32"),
            adapter={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            training__learning_rate=3e-2,
            training__logging_steps=1,
            training__per_device_train_batch_size=batch,
        )
        run, store = make_run(
            tmp_path / name, recipe, NEW_TOKENS, strategy="ddp", processes_per_node=processes
        )
        launch(run, store)
        return run, store

    (one, store), (two, _) = trained("one", 1, 4), trained("two", 2, 2)

    def curve(run):
        lines = read_lines(run.path / "metrics.jsonl")
        return [line.get("loss", line.get("eval_loss")) for line in lines]

    assert curve(two) == pytest.approx(curve(one), abs=2e-5)
    evaluated = [entry["loss"] for entry in two.read("training.json")["eval"]]
    assert evaluated[-1] < evaluated[0] - 0.05
    with safe_open(two.model / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    assert {name for name in saved if "lora_" not in name and "token_adapter" not in name} == set()
    assert any("token_adapter" in name for name in saved)
    validation = PackedDataset(store.path(one.refs()["pack"]), "validation")
    merged = evaluate_loss(load_trained(two.model), validation, 3, "cpu")
    assert merged.loss == pytest.approx(evaluated[-1], abs=1e-5)
    assert check_saved(two)["ids"]
