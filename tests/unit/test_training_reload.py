"""A saved model is tried as its users load it; what makes it unusable is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import StoreError, TrainingError
from pipelines.training import reload as module
from pipelines.training.models import build_model, save_trained
from pipelines.training.reload import check_saved, try_model
from tests.assets.tiny_models import write_base_model, write_chat_tokenizer
from tests.assets.training_runs import make_recipe, make_run

CHAT = (
    "{% for m in messages %}{{ '<|user|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved chat model, and the ids of <|assistant|> and <|end|>."""
    base = write_base_model(tmp_path / "base", "gpt_bigcode")
    tokenizer, new_ids = write_chat_tokenizer(tmp_path / "chat", base)
    (tokenizer / "chat_template.jinja").unlink(missing_ok=True)
    change(tokenizer / "tokenizer_config.json", end_of_answer="<|end|>", chat_template=CHAT)
    recipe = make_recipe(model={"model_name_or_path": str(base), "dtype": "float32"})
    save_trained(build_model(recipe, tokenizer), tmp_path / "model", tokenizer, "float32")
    return tmp_path / "model", new_ids[2:]


def test_a_saved_chat_model_is_asked_in_its_template_and_stops_at_all_its_stop_ids(saved):
    folder, (_, end) = saved

    found = try_model(folder, "cpu")

    assert found["prompt"] == "<|user|>Return the sum of two numbers.<|end|><|assistant|>"
    assert found["stop_ids"] == [0, end]
    assert 1 <= len(found["ids"]) <= 8
    assert isinstance(found["text"], str)


def test_what_makes_a_saved_model_unusable_is_named(saved):
    folder, (_, end) = saved
    weights, path = load_file(folder / "model.safetensors"), folder / "model.safetensors"

    change(folder / "generation_config.json", eos_token_id=0)
    with pytest.raises(TrainingError, match=rf"stops at \[0\], its answers end with \[0, {end}\]"):
        try_model(folder, "cpu")
    change(folder / "generation_config.json", eos_token_id=[0, end])

    change(folder / "config.json", use_cache=False)
    with pytest.raises(TrainingError, match="config.json has use_cache: false"):
        try_model(folder, "cpu")
    change(folder / "config.json", use_cache=True)

    name = "transformer.wte.weight"
    save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, path)
    with pytest.raises(TrainingError, match="its logits are not finite"):
        try_model(folder, "cpu")

    save_file({**weights, name: weights[name][:200].clone()}, path)
    change(folder / "config.json", vocab_size=200)
    with pytest.raises(TrainingError, match="200 embedding rows, its tokenizer ids up to 303"):
        try_model(folder, "cpu")

    path.write_bytes(b"cut")
    with pytest.raises(StoreError, match="it does not load"):
        try_model(folder, "cpu")


def test_a_model_is_tried_once_for_each_training(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path)
    tried = []

    def reload_folder(run, folder):
        tried.append(folder)
        return {"ids": [1], "stop_ids": [0]}

    monkeypatch.setattr(module, "reload_folder", reload_folder)
    run.write("training.json", {"status": "finished", "global_step": 1})

    first, second = check_saved(run), check_saved(run)
    run.write("training.json", {"status": "finished", "global_step": 2})
    check_saved(run)

    assert first == second == run.read("reload.json") | {"training": first["training"]}
    assert tried == [run.model, run.model]
