"""Which attention is used, and that every accepted one keeps packed documents apart."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    Qwen2Config,
    Starcoder2Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from pipelines.errors import RecipeError, TrainingError
from pipelines.training import attention, varlen
from pipelines.training.attention import (
    build_twin,
    check_attention,
    choose_attention,
    leak,
    packing_difference,
    use_attention,
)
from tests.assets.training_runs import make_recipe

CONFIGS = [
    GPTBigCodeConfig(vocab_size=64, n_positions=64, attn_pdrop=0.0),
    Starcoder2Config(vocab_size=64),
    LlamaConfig(vocab_size=64),
    Qwen2Config(vocab_size=64),
]
SHAPES = {
    "one row": ((5, 9, 3),),
    "several rows": ((4, 6), (7, 3)),
    "padded rows": ((5, 9, 3), (7, 4)),
}


def mixing_attention(module, query, key, value, attention_mask, **options):
    """Attend causally, whatever the mask or the boundaries say."""
    return sdpa_attention_forward(module, query, key, value, None, scaling=options["scaling"])


@pytest.fixture
def mixing():
    AttentionInterface.register("mixing", mixing_attention)
    AttentionMaskInterface.register("mixing", lambda **_: None)
    return "mixing"


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_model_of_any_number_of_layers_has_a_twin_of_two(layers):
    twin = build_twin(Qwen2Config(vocab_size=64, num_hidden_layers=layers), "sdpa")

    assert twin.config.layer_types == ["full_attention", "full_attention"]
    assert len(twin.model.layers) == 2
    assert packing_difference(twin, "cpu") < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wanted", ["auto", "varlen", "sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_packed_documents_have_the_logits_they_have_alone(config, wanted, shape, monkeypatch):
    monkeypatch.setattr(attention, "SHAPES", (SHAPES[shape],))
    twin = build_twin(config, choose_attention(wanted, config))

    assert packing_difference(twin, "cpu") < 1e-4
    assert leak(twin, "cpu") == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_an_attention_that_mixes_is_seen_in_every_shape_and_refused(config, mixing, monkeypatch):
    twin = build_twin(config, mixing)
    for shape in SHAPES.values():
        monkeypatch.setattr(attention, "SHAPES", (shape,))
        assert packing_difference(twin, "cpu") > 0.1
        assert leak(twin, "cpu") > 0.1

    with pytest.raises(TrainingError, match=f"{config.model_type} with attention 'mixing' mixes"):
        check_attention(config, mixing, "cpu")


def test_auto_is_the_first_attention_that_is_safe_for_the_architecture(mixing, monkeypatch):
    dropout = GPTBigCodeConfig(vocab_size=64, n_positions=64)
    softcap = Gemma2Config(vocab_size=64, attn_logit_softcapping=5.0)

    found = [choose_attention("auto", config) for config in (*CONFIGS, dropout, softcap)]

    assert found == [varlen.NAME] * 4 + ["sdpa", "eager"]
    monkeypatch.setattr(varlen, "register", lambda: mixing)
    assert choose_attention("auto", CONFIGS[0]) == "sdpa"
    monkeypatch.setattr(attention, "packing_difference", lambda *_: 7.4)
    with pytest.raises(TrainingError, match="no attention keeps packed documents .* apart; mixing"):
        choose_attention("auto", CONFIGS[0])


def test_varlen_is_refused_where_the_model_wants_dropout_in_attention():
    with pytest.raises(TrainingError, match="varlen has no dropout, .* 0.1 for attention"):
        choose_attention("varlen", GPTBigCodeConfig())


def test_the_attention_of_a_built_model_is_switched():
    model = build_twin(CONFIGS[0], "sdpa")
    use_attention(model, "varlen")
    assert packing_difference(model, "cpu") < 1e-4
    use_attention(model, "eager")
    assert packing_difference(model, "cpu") < 1e-4


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_attention_that_is_not_safe_for_all_is_refused_in_the_recipe_with_the_reason(name):
    with pytest.raises(RecipeError, match=f"{name} is not offered: .*gpt_bigcode"):
        make_recipe(model__attn_implementation=name)


def test_the_check_leaves_the_random_state_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)

    choose_attention("auto", CONFIGS[1])

    assert torch.equal(torch.rand(3), expected)
