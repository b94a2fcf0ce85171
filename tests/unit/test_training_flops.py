"""Operations counted from real architectures on the meta device, and the peaks they are held to."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipelines.settings.training import Adapter
from pipelines.training.adapters import add_adapter
from pipelines.training.flops import PEAK_VARIABLE, Flops, Speed, count_flops, find_peak

GIGA = 1e9
STARCODERBASE_1B = {"n_layer": 24, "n_embd": 2048, "n_head": 16}
STARCODER = {"n_layer": 40, "n_embd": 6144, "n_head": 48}
BIGCODE = {"n_positions": 8192, "vocab_size": 49_152, "multi_query": True}


def on_meta(model_type, **shape):
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape))


def adapted(model):
    """Add the benchmark's adapter."""
    with torch.device("meta"):
        return add_adapter(model, Adapter(r=16, target_modules=("c_attn", "c_proj", "c_fc")), [])


def pairs_of(tokens, document):
    """The pairs of causal attention when `tokens` are documents of one length, in large numbers."""
    return tokens * document // 2


def test_starcoderbase_1b_takes_6_9_gflop_a_token_and_4_7_with_lora():
    model = on_meta("gpt_bigcode", **STARCODERBASE_1B, **BIGCODE)

    full = count_flops(model)

    # 24 blocks: queries 2048^2, one key and one value head, output, an MLP of two matrices; the
    # tied head. Neither the looked-up positions nor biases and norms.
    block = 2048 * (2048 + 2 * 128) + 2048**2 + 2 * 2048 * 8192
    assert full.per_token == 6 * (24 * block + 49_152 * 2048)
    assert full.per_pair == 12 * 24 * 2048
    assert (full.recomputed_per_token, full.recomputed_per_pair) == (0, 0)
    assert full.of(1000, pairs_of(1000, 700)) / 1000 / GIGA == pytest.approx(6.9, abs=0.05)

    lora = count_flops(adapted(model))
    assert lora.of(1000, pairs_of(1000, 700)) / 1000 / GIGA == pytest.approx(4.7, abs=0.07)
    adapters = 24 * 16 * ((2048 + 2304) + (2048 + 2048) + 2 * (2048 + 8192))
    assert lora.per_token == 4 * full.per_token // 6 + 6 * adapters


def test_starcoder_15b_with_lora_takes_63_gflop_a_token_and_94_with_checkpointing():
    model = adapted(on_meta("gpt_bigcode", **STARCODER, **BIGCODE))

    lora = count_flops(model, gradient_checkpointing=True)

    pairs = pairs_of(1000, 700)
    assert lora.of(1000, pairs) / 1000 / GIGA == pytest.approx(62.9, rel=0.01)
    assert lora.of(1000, pairs, recomputed=True) / 1000 / GIGA == pytest.approx(93.6, rel=0.01)


@pytest.mark.parametrize(
    ("model_type", "matrices"),
    [("starcoder2", 2), ("llama", 3), ("qwen2", 3)],
)
def test_plain_and_gated_mlps_and_grouped_queries_count_their_own_matrices(model_type, matrices):
    model = on_meta(
        model_type,
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=160, vocab_size=1000,
    )  # fmt: skip

    attention = 64 * 64 * 2 + 2 * 64 * 32
    weights = 2 * (attention + matrices * 64 * 160) + 1000 * 64
    assert count_flops(model).per_token == 6 * weights
    assert count_flops(model).per_pair == 12 * 2 * 64
    checkpointed = count_flops(model, gradient_checkpointing=True)
    assert checkpointed.recomputed_per_token == 2 * (weights - 1000 * 64)


def test_the_count_agrees_with_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 256}
    config = AutoConfig.for_model("gpt_bigcode", multi_query=True, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(2, 128, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    # Eager attention multiplies all pairs, also those that the causal mask discards.
    counted = count_flops(model).of(2 * 128, 2 * 128 * 128)
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(
    ("device", "dtype", "teraflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200 NVL", "bfloat16", 835.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ],
)
def test_the_peak_is_that_of_the_device_and_dtype(device, dtype, teraflops, monkeypatch):
    monkeypatch.delenv(PEAK_VARIABLE, raising=False)
    assert find_peak(device, dtype) == pytest.approx(teraflops * 1e12)


def test_the_peak_is_unknown_on_cpu_and_for_unknown_devices_unless_given(monkeypatch, caplog):
    monkeypatch.delenv(PEAK_VARIABLE, raising=False)
    assert find_peak(None, "float32") is None
    assert caplog.text == ""
    assert find_peak("Oracle 9", "bfloat16") is None
    assert "no peak FLOP/s is known for 'Oracle 9'" in caplog.text
    assert find_peak("Oracle 9", "bfloat16", 50.0) == 50e12
    monkeypatch.setenv(PEAK_VARIABLE, "790")
    assert find_peak("NVIDIA H200", "bfloat16", 50.0) == 790e12
    monkeypatch.setenv(PEAK_VARIABLE, "much")
    with caplog.at_level(logging.WARNING):
        assert find_peak("NVIDIA H200", "bfloat16") == 989.4e12
    assert "STARLOOM_PEAK_TFLOPS='much' is no number" in caplog.text


def test_utilization_is_the_share_of_the_peak_and_null_without_one():
    flops = Flops(per_token=100, per_pair=2, recomputed_per_token=50)

    used = Speed(flops, 1e4).utilization(tokens=40, pairs=500, seconds=1.0)

    assert used == {"mfu": 0.5, "hfu": 0.7}
    assert Speed(flops, None).utilization(40, 500, 1.0) == {"mfu": None, "hfu": None}
    assert Speed(flops, 1e4).utilization(0, 0, 0.0) == {"mfu": None, "hfu": None}
