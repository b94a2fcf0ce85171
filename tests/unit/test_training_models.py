"""Models of recipes: the same weights everywhere, new tokens, adapters, and what is saved."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.errors import RecipeError, StoreError, TrainingError
from pipelines.training.models import (
    build_model,
    count_parameters,
    load_tokenizer,
    load_trained,
    save_trained,
)
from tests.assets.tiny_models import check_merged, write_base_model
from tests.assets.training_runs import make_recipe, write_tokenizer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A base model folder: 384 rows, its own tokenizer with 300 ids."""
    folder = tmp_path_factory.mktemp("base")
    build_model(make_recipe(), tokenizer).save_pretrained(folder)
    write_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.1}))
    return folder


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory, tokenizer):
    """The same tokenizer with more control tokens than the base model has spare rows."""
    folder = tmp_path_factory.mktemp("chat")
    larger = AutoTokenizer.from_pretrained(tokenizer)
    larger.add_special_tokens({"extra_special_tokens": [f"<|t{i}|>" for i in range(100)]})
    larger.save_pretrained(folder)
    return folder


def from_base(base, adapter=None, **overrides):
    return make_recipe(
        model={"model_name_or_path": str(base), "dtype": "float32"}, adapter=adapter, **overrides
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_model_from_scratch_has_the_recipes_shape_and_the_tokenizers_ids(tokenizer):
    model = build_model(make_recipe(), tokenizer)
    config = model.config

    assert config.vocab_size == 384  # 300 ids, padded to a multiple of 128
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (2, 2, 32, 64)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 4)
    assert (config.attn_pdrop, config.embd_pdrop, config.resid_pdrop) == (0, 0, 0)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == 0


def test_the_same_recipe_gives_the_same_weights_whatever_was_drawn_before(tokenizer):
    first = weights(build_model(make_recipe(), tokenizer))
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    again = weights(build_model(make_recipe(), tokenizer))
    other = weights(build_model(make_recipe(training__seed=1), tokenizer))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_base_model_keeps_its_weights_and_loses_its_dropout(base, tokenizer):
    model = build_model(from_base(base), tokenizer)
    scratch = weights(build_model(make_recipe(), tokenizer))

    assert model.config.attn_pdrop == 0
    assert all(torch.equal(tensor, scratch[name]) for name, tensor in weights(model).items())


def test_new_tokens_start_at_the_mean_of_the_known_rows_in_a_padded_vocabulary(
    base, chat_tokenizer
):
    model = build_model(from_base(base), chat_tokenizer)
    rows = model.get_input_embeddings().weight

    assert rows.shape[0] == 512  # 400 ids
    assert model.get_output_embeddings().weight is rows
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(rows[:300], old[:300])
    assert torch.allclose(rows[300:], old[:300].mean(0).expand(212, -1), atol=1e-6)


def test_an_adapter_trains_its_matrices_and_the_rows_of_new_tokens_only(base, chat_tokenizer):
    model = build_model(from_base(base, LORA), chat_tokenizer)

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kinds = {n.split(".")[-3] if "lora" in n else n.split(".")[-2] for n in trained}

    # r (inputs + outputs) of c_attn, both c_proj and c_fc in two layers, and 100 rows of 32.
    lora = 2 * 4 * ((32 + 64) + (32 + 32) + (32 + 128) + (128 + 32))
    assert kinds == {"lora_A", "lora_B", "trainable_tokens_delta"}
    assert count_parameters(model)[1] == lora + 100 * 32


def test_a_known_tokenizer_adds_no_trained_rows(base, tokenizer):
    model = build_model(from_base(base, LORA), tokenizer)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }


def test_a_target_that_matches_no_layer_is_refused_with_what_there_is(base, tokenizer):
    recipe = from_base(base, LORA | {"target_modules": ["c_proj", "q_attn"]})

    with pytest.raises(RecipeError) as error:
        build_model(recipe, tokenizer)

    assert str(error.value) == (
        "adapter.target_modules: 'q_attn' matches no layer, did you mean 'c_attn'? "
        "(this gpt_bigcode has: c_attn, c_fc, c_proj)"
    )


def test_a_foreign_tokenizer_is_refused(base, tokenizer, tmp_path):
    text = (tokenizer / "tokenizer.json").read_text().replace('"filler', '"other')
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content = text if name == "tokenizer.json" else (tokenizer / name).read_text()
        (tmp_path / name).write_text(content)
    vocabulary = json.loads(text)
    ids = list(vocabulary["model"]["vocab"].items())
    vocabulary["model"]["vocab"] = {n: 299 - i for n, i in ids}
    vocabulary["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))

    with pytest.raises(RecipeError, match="use the model's own tokenizer"):
        build_model(from_base(base), tmp_path)


def test_a_tokenizer_that_pads_with_its_end_token_is_refused(tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(tokenizer)
    other.pad_token = other.eos_token
    other.save_pretrained(tmp_path)

    with pytest.raises(TrainingError, match="pad token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "pickle"])
def test_a_base_that_is_not_there_or_only_a_pickle_is_refused(base, tokenizer, tmp_path, kind):
    folder = tmp_path / "base"
    if kind == "pickle":
        folder.mkdir()
        (folder / "config.json").write_text((base / "config.json").read_text())
        torch.save({}, folder / "pytorch_model.bin")

    with pytest.raises(TrainingError, match=r"model\.model_name_or_path .* cannot be loaded"):
        build_model(from_base(folder), tokenizer)


def test_more_tokens_than_positions_are_refused(base, tokenizer):
    with pytest.raises(RecipeError, match="block_size 128 is above the 64 positions"):
        build_model(from_base(base, tokenization__block_size=128), tokenizer)


def test_a_full_model_is_saved_whole_with_its_tokenizer(tokenizer, tmp_path):
    model = build_model(make_recipe(), tokenizer)
    model.config.use_cache = False
    before = weights(model)

    save_trained(model, tmp_path / "model", tokenizer, "float32")

    reloaded = load_trained(tmp_path / "model")
    assert all(torch.equal(before[n], tensor) for n, tensor in weights(reloaded).items())
    assert reloaded.config.use_cache
    assert not reloaded.training
    assert (reloaded.generation_config.eos_token_id, reloaded.generation_config.pad_token_id) == (
        0,
        4,
    )
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_an_adapter_is_saved_beside_the_merged_model_that_gives_the_same_logits(
    base, chat_tokenizer, tmp_path
):
    from peft import PeftModel

    recipe = from_base(base, LORA)
    model = build_model(recipe, chat_tokenizer).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.05)
    ids = torch.tensor([[5, 6, 7, 399, 300]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits

    save_trained(model, tmp_path / "model", chat_tokenizer, "float32")

    merged = load_trained(tmp_path / "model")
    fresh = build_model(from_base(base), chat_tokenizer)
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "model" / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
        assert torch.allclose(adapted(input_ids=ids).logits, expected, atol=1e-5)
    adapter = tmp_path / "model" / "adapter" / "adapter_model.safetensors"
    assert adapter.stat().st_size < 100_000
    # A server that runs as somebody else reads the weights as it reads config.json.
    modes = {path.stat().st_mode for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert len(modes) == 1, modes


def test_damaged_weights_of_the_right_size_are_an_error_of_one_line(tmp_path, tokenizer):
    save_trained(build_model(make_recipe(), tokenizer), tmp_path / "model", tokenizer, "float32")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)

    with pytest.raises(StoreError, match="the model cannot be loaded .*; train it again") as error:
        load_trained(tmp_path / "model")

    assert "\n" not in str(error.value)


def test_dropout_is_off_unless_the_recipe_says_otherwise(base, tokenizer):
    def rates(dropout):
        config = build_model(
            make_recipe(
                model={"model_name_or_path": str(base), "dtype": "float32", "dropout": dropout}
            ),
            tokenizer,
        ).config
        return config.attn_pdrop, config.embd_pdrop, config.resid_pdrop

    assert rates(0.0) == (0, 0, 0)
    assert rates(0.05) == (0.05, 0.05, 0.05)
    assert rates(None) == (0.1, 0, 0)  # as the base's config.json has them


@pytest.mark.parametrize("kind", ["use_rslora", "use_dora"])
def test_rslora_and_dora_merge_to_the_same_logits(base, chat_tokenizer, tmp_path, kind):
    model = build_model(from_base(base, LORA | {kind: True}), chat_tokenizer).eval()
    plain = count_parameters(build_model(from_base(base, LORA), chat_tokenizer))[1]
    magnitudes = 2 * (64 + 32 + 128 + 32)  # one number an output, in two layers
    assert count_parameters(model)[1] == plain + (magnitudes if kind == "use_dora" else 0)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
        expected = model(input_ids=torch.tensor([[5, 6, 7, 399]])).logits

    save_trained(model, tmp_path / "model", chat_tokenizer, "float32")

    with torch.no_grad():
        merged = load_trained(tmp_path / "model")(input_ids=torch.tensor([[5, 6, 7, 399]])).logits
    assert torch.allclose(merged, expected, atol=1e-5)
    assert layer.scaling["default"] == (8 / 4**0.5 if kind == "use_rslora" else 8 / 4)


def test_what_is_trained_is_float32_over_a_base_in_bfloat16(base, chat_tokenizer):
    recipe = make_recipe(model={"model_name_or_path": str(base), "dtype": "bfloat16"}, adapter=LORA)
    model = build_model(recipe, chat_tokenizer)

    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_saved_model_ends_answers_at_the_templates_stop_token_too(chat_tokenizer, tmp_path):
    folder = shutil.copytree(chat_tokenizer, tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"end_of_answer": "<|t3|>"}))
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|t3|>")

    save_trained(build_model(make_recipe(), folder), tmp_path / "model", folder, "float32")

    saved = load_trained(tmp_path / "model")
    assert saved.generation_config.eos_token_id == [0, end]
    assert saved.config.eos_token_id == 0


# tests/system/test_after_training.py has all combinations.
MERGED = [
    ("gpt_bigcode", False, "lora"),
    ("starcoder2", True, "dora"),
    ("llama", False, "rslora"),
    ("qwen2", True, "lora"),
]


@pytest.mark.parametrize(("model_type", "tied", "kind"), MERGED)
def test_the_merged_model_is_the_base_with_its_adapter(tmp_path, model_type, tied, kind):
    base = write_base_model(tmp_path / "base", model_type, tied=tied)
    check_merged(base, tmp_path, kind)


def test_an_adapter_that_learned_nothing_or_lost_a_tensor_is_not_saved_as_a_model(
    base, chat_tokenizer, tmp_path, monkeypatch
):
    with pytest.raises(TrainingError, match="has learned nothing: every lora_B of its 17 tensors"):
        save_trained(
            build_model(from_base(base, LORA), chat_tokenizer),
            tmp_path / "zero",
            chat_tokenizer,
            "float32",
        )
    model = build_model(from_base(base, LORA), chat_tokenizer)
    write = model.save_pretrained

    def write_less(folder):
        write(folder)
        path = folder / "adapter_model.safetensors"
        save_file(dict([*load_file(path).items()][1:]), path)

    model.save_pretrained = write_less
    with pytest.raises(TrainingError, match="was saved with 16 of its 17 tensors"):
        save_trained(model, tmp_path / "less", chat_tokenizer, "float32")


def test_a_model_with_its_own_template_keeps_the_stop_tokens_of_its_base(base, chat_tokenizer):
    folder = shutil.copytree(base, chat_tokenizer.parent / "own-stops")
    AutoModelForCausalLM.from_pretrained(folder).generation_config.save_pretrained(folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [7, 0]}))

    own = build_model(from_base(folder, template={"name": "model"}), chat_tokenizer)
    other = build_model(from_base(folder), chat_tokenizer)

    assert own.generation_config.eos_token_id == [0, 7]
    assert other.generation_config.eos_token_id == 0
