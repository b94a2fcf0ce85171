"""Target patterns: what they match, what is refused, and the published sizes of adapters."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTBigCodeConfig

from pipelines.errors import PreflightError, RecipeError
from pipelines.preflight import checks
from pipelines.settings.training import Adapter
from pipelines.training.adapters import add_adapter
from pipelines.training.models import count_parameters
from pipelines.training.targets import describe_targets, resolve_targets, target_problems
from tests.assets.tiny_models import tiny_config
from tests.assets.training_runs import make_recipe

STARCODERBASE_1B = {"n_layer": 24, "n_head": 16, "n_embd": 2048, "n_inner": 8192}
STARCODER = {"n_layer": 40, "n_head": 48, "n_embd": 6144, "n_inner": 24576}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def starcoder(shape):
    return on_meta(GPTBigCodeConfig(vocab_size=49_152, n_positions=8192, **shape))


@pytest.mark.parametrize(
    ("shape", "r", "targets", "matched", "size"),
    [
        (STARCODERBASE_1B, 8, ("c_attn", "c_proj", "c_fc"), (24, 48, 24), 5_554_176),
        (STARCODER, 16, ("c_proj", "c_attn"), (80, 40), 35_553_280),
    ],
    ids=["scikit-learn: 1B, r 8", "code-alpaca: 15.5B, r 16"],
)
def test_the_seeds_adapters_have_the_published_sizes(shape, r, targets, matched, size):
    model = starcoder(shape)
    found = resolve_targets(model, targets)

    assert tuple(len(names) for names in found.values()) == matched
    with torch.device("meta"):
        adapted = add_adapter(model, Adapter(r=r, target_modules=targets), [])
    assert count_parameters(adapted)[1] == size


def test_what_a_pattern_matches_is_said_in_one_line_each():
    found = resolve_targets(starcoder(STARCODERBASE_1B), ["c_proj", "0.attn.c_attn"])

    assert describe_targets(found) == [
        "c_proj -> 48 layers: transformer.h.0-23.attn.c_proj, transformer.h.0-23.mlp.c_proj",
        "0.attn.c_attn -> 1 layer: transformer.h.0.attn.c_attn",
    ]


@pytest.mark.parametrize(
    ("model_type", "patterns", "message"),
    [
        (
            "gpt_bigcode",
            ["c_proj", "c_attn", "q_attn"],
            (
                "'q_attn' matches no layer, did you mean 'c_attn'? "
                "(this gpt_bigcode has: c_attn, c_fc, c_proj)"
            ),
        ),
        (
            "starcoder2",
            ["q_proj", "gate_proj", "down_proj"],
            (
                "'gate_proj' matches no layer, did you mean 'v_proj'?; 'down_proj' matches no "
                "layer, did you mean 'o_proj'? "
                "(this starcoder2 has: c_fc, c_proj, k_proj, o_proj, q_proj, v_proj)"
            ),
        ),
        (
            "llama",
            ["c_attn", "lm_head"],
            (
                "'c_attn' matches no layer; 'lm_head' matches no layer (this llama has: down_proj, "
                "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)"
            ),
        ),
        (
            "gpt_bigcode",
            ["proj"],
            (
                "'proj' matches no layer, did you mean 'c_proj'? "
                "(this gpt_bigcode has: c_attn, c_fc, c_proj)"
            ),
        ),
    ],
)
def test_a_pattern_that_matches_nothing_fails_with_what_there_is(model_type, patterns, message):
    with pytest.raises(RecipeError) as error:
        resolve_targets(on_meta(tiny_config(model_type)), patterns)

    assert str(error.value) == f"adapter.target_modules: {message}"
    assert target_problems(patterns, model_type) == [str(error.value)]


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "mystery"])
def test_what_matches_or_cannot_be_known_is_no_problem(model_type):
    assert target_problems(["c_attn", "h.0.attn.c_proj", "all-linear"], model_type) == []


def test_preflight_refuses_a_pattern_without_a_layer_before_any_work(tmp_path):
    adapter = {"target_modules": ["c_attn", "q_attn"]}
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    local = {"model_name_or_path": str(tmp_path)}

    for recipe in (make_recipe(adapter=adapter), make_recipe(adapter=adapter, model=local)):
        with pytest.raises(PreflightError, match="'q_attn' matches no layer, did you mean 'c_att"):
            checks.check(recipe, tmp_path)
