"""Every architecture, with an adapter and whole: trained, saved, loaded again, generating."""

import json
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import distributed
from transformers import AutoTokenizer

from pipelines.jsonlines import read_lines
from pipelines.training.architectures import LINEAR_LAYERS
from pipelines.training.attention import check_packing
from pipelines.training.environment import GROUP
from pipelines.training.models import build_model, count_parameters, load_trained
from pipelines.training.targets import leaf_names, resolve_targets
from pipelines.training.trainer import train
from tests.assets.tiny_models import SHAPES, write_base_model, write_chat_tokenizer
from tests.assets.training_runs import VOCABULARY, make_recipe, make_run

ARCHITECTURES = sorted(SHAPES)
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return write_base_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def starcoder(tmp_path):
    return write_base_model(tmp_path / "base", "gpt_bigcode")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """The environment that torchrun gives its only rank, and nothing of it left behind."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name in GROUP:
            patch.setenv(name, "1" if "SIZE" in name else "0")
        yield
    signal.signal(signal.SIGTERM, handler)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def recipe_for(base, **overrides):
    model = {"model_name_or_path": str(base), "dtype": "float32"}
    short = {
        "max_steps": 3,
        "eval_steps": 3,
        "save_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 1,
    }
    training = {f"training__{name}": value for name, value in short.items()}
    return make_recipe(model=model, **{**training, **overrides})


def train_here(root, recipe, tokenizer):
    """Train in this process, on one rank; return the run."""
    run, store = make_run(root, recipe, strategy="ddp", processes_per_node=1)
    run.checkpoints.mkdir()
    train(run, store.path(run.refs()["pack"]), tokenizer)
    return run


def losses(run):
    return [line["loss"] for line in read_lines(run.path / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_changing_the_model_alone_trains_saves_and_generates(base, adapter, tmp_path):
    tokenizer, _ = write_chat_tokenizer(tmp_path / "chat", base)
    run = train_here(tmp_path, recipe_for(base, adapter=adapter), tokenizer)

    assert not distributed.is_initialized(), "DDP would hold every gradient twice"
    result = run.read("training.json")
    assert (result["status"], result["global_step"]) == ("finished", 3)
    assert (result["trainable_parameters"] < result["parameters"]) == bool(adapter)
    assert (run.model / "adapter" / "adapter_model.safetensors").exists() == bool(adapter)
    config = json.loads((run.model / "config.json").read_text())
    assert config["model_type"] == json.loads((base / "config.json").read_text())["model_type"]
    assert config["use_cache"]

    model, reloaded = load_trained(run.model), AutoTokenizer.from_pretrained(run.model)
    assert model.get_input_embeddings().num_embeddings == 384
    prompt = torch.tensor([[*reloaded("x = ")["input_ids"], VOCABULARY + 3]])
    written = model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > prompt.shape[1]


def test_all_linear_layers_but_the_head_are_adapted_and_the_new_tokens_rows(base, tmp_path):
    tokenizer, new_ids = write_chat_tokenizer(tmp_path, base)
    model = build_model(recipe_for(base, adapter=ADAPTER), tokenizer)

    kind = model.config.model_type
    assert set(model.peft_config["default"].target_modules) == set(LINEAR_LAYERS[kind])
    assert set(leaf_names(model.targeted_module_names)) == set(LINEAR_LAYERS[kind])
    rows = {n: p.shape for n, p in model.named_parameters() if "trainable_tokens_delta" in n}
    assert set(rows.values()) == {(len(new_ids), 32)}
    assert len(rows) == (1 if model.config.tie_word_embeddings else 2)


def test_new_rows_start_at_the_mean_of_the_known_ones_and_move_alone(base, tmp_path):
    tokenizer, new_ids = write_chat_tokenizer(tmp_path, base)
    model = build_model(recipe_for(base, adapter=ADAPTER), tokenizer)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [e.weight.detach().clone() for e in embeddings]
    mean = torch.cat([before[0][:300], before[0][304:]]).mean(0)
    assert torch.allclose(before[0][new_ids], mean.expand(4, -1), atol=1e-6)

    ids = torch.tensor([[5, *new_ids, 6, *new_ids]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

    model = model.merge_and_unload()
    after = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    for old, new in zip(before, after, strict=True):
        moved = (old != new).any(1).nonzero().flatten().tolist()
        assert moved == new_ids
    assert (after[0] is after[1]) == model.config.tie_word_embeddings


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_stay_apart(base, attention, tmp_path):
    settings = {"model_name_or_path": str(base), "attn_implementation": attention}
    model = build_model(make_recipe(model=settings), base)
    check_packing(model, "cpu")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_random_weights_of_each_architecture_have_starcoders_proportions(model_type, tmp_path):
    from pipelines.preflight import checks
    from tests.assets.training_runs import write_tokenizer

    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 64}
    recipe = make_recipe(model__config={"model_type": model_type, **shape})
    model = build_model(recipe, write_tokenizer(tmp_path))

    config = model.config
    assert config.model_type == model_type
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (3, 4, 64)
    found = resolve_targets(model, ["all-linear"])["all-linear"]
    assert set(leaf_names(found)) == set(LINEAR_LAYERS[model_type])
    # Preflight knows 300 of the 384 rows.
    estimate = checks.count_parameters(recipe)
    assert estimate == pytest.approx(count_parameters(model)[0], rel=0.1)


def test_gradient_checkpointing_changes_no_loss(starcoder, tmp_path):
    curves = []
    for on in (False, True):
        recipe = recipe_for(starcoder, adapter=ADAPTER, training__gradient_checkpointing=on)
        curves.append(losses(train_here(tmp_path / str(on), recipe, starcoder)))

    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_noise_on_embeddings_is_added_in_training_only(starcoder, tmp_path):
    runs = [
        train_here(
            tmp_path / str(alpha),
            recipe_for(starcoder, training__neftune_noise_alpha=alpha),
            starcoder,
        )
        for alpha in (None, 5.0)
    ]

    plain, noisy = (read_lines(run.path / "metrics.jsonl") for run in runs)
    assert plain[0]["eval_loss"] == noisy[0]["eval_loss"]
    assert plain[1]["loss"] != noisy[1]["loss"]
    assert plain[1]["loss"] == pytest.approx(noisy[1]["loss"], rel=0.1)
    model = load_trained(runs[1].model).train()  # no hook is left in what was saved
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_over_a_quantized_base_is_trained_and_saved_whole(bits, starcoder, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra bitsandbytes is not installed")
    model = {"dtype": "float32", "quantization_config": {f"load_in_{bits}bit": True}}
    recipe = make_recipe(
        model={"model_name_or_path": str(starcoder), **model},
        adapter=ADAPTER,
        training__gradient_checkpointing=True,
        training__learning_rate=1e-2,
        training__max_steps=6,
    )

    run = train_here(tmp_path, recipe, starcoder)

    evaluated = [e["loss"] for e in run.read("training.json")["eval"]]
    assert evaluated[-1] < evaluated[0]
    assert load_trained(run.model).dtype == torch.float32
