"""The head's loss and gradients without all logits, for every kind of head; and what falls back."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, GPTBigCodeConfig, GraniteConfig, LlamaConfig

from pipelines.errors import TrainingError
from pipelines.training import head_loss, varlen
from pipelines.training.attention import build_twin
from pipelines.training.head_loss import HeadLoss, Targets
from tests.assets.packed_batches import make_batch

TIED = GPTBigCodeConfig(vocab_size=64)
UNTIED = LlamaConfig(vocab_size=64, tie_word_embeddings=False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_loss, "SMALLEST_CHUNK", 8)
    monkeypatch.setattr(head_loss, "LARGEST_CHUNK", 8)


def partly_trained(shape=((12, 9, 3), (7, 4)), **options):
    batch = make_batch(shape, **options)
    batch["labels"][:, 4:7] = -100
    return batch


def adapted(model, **options):
    targets = ["c_attn"] if model.config.model_type == "gpt_bigcode" else ["q_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, config)


def models():
    yield "tied", build_twin(TIED, "sdpa")
    yield "untied", build_twin(UNTIED, "sdpa")
    yield "LoRA", adapted(build_twin(TIED, "sdpa"))
    yield (
        "LoRA and new rows, tied",
        adapted(build_twin(TIED, "sdpa"), trainable_token_indices={"wte": [3, 60]}),
    )
    yield (
        "LoRA and new rows, untied",
        adapted(
            build_twin(UNTIED, "sdpa"),
            trainable_token_indices={"embed_tokens": [3, 60], "lm_head": [3, 60]},
        ),
    )


def step(model, batch, wanted):
    """Return the mean loss of a training step and its gradients, by the model itself for None."""
    model = copy.deepcopy(model).train()
    if wanted is None:
        loss = model(**batch, use_cache=False).loss
    else:
        loss = HeadLoss(model, wanted)(model, batch) / Targets.of(batch["labels"]).ids.numel()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wanted", ["auto", "fused", "chunked", "dense"])
@pytest.mark.parametrize(("name", "model"), models(), ids=lambda x: x if isinstance(x, str) else "")
def test_loss_and_gradients_are_those_of_the_model(name, model, wanted):
    expected_loss, expected = step(model, partly_trained(), None)
    loss, gradients = step(model, partly_trained(), wanted)

    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("wanted", ["fused", "chunked", "dense"])
def test_the_nats_of_each_token_add_up_to_the_loss(wanted):
    model = build_twin(TIED, "sdpa")
    batch = partly_trained()
    head = HeadLoss(model, wanted)

    with torch.no_grad():
        each = head(model, batch, summed=False)
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)

    trained = batch["labels"][:, 1:] != -100
    expected = -logits.logits[:, :-1].log_softmax(-1)[trained]
    expected = expected.gather(1, batch["labels"][:, 1:][trained][:, None])[:, 0]
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head(model, batch), each.sum())


def test_a_batch_without_a_trained_token_has_no_loss_and_no_gradient():
    model = build_twin(TIED, "sdpa")
    batch = make_batch(((4,),))
    batch["labels"][:] = -100
    for wanted in ("fused", "chunked", "dense"):
        fresh = copy.deepcopy(model)
        loss = HeadLoss(fresh, wanted)(fresh, batch)
        loss.backward()
        assert loss == 0


def test_a_model_whose_head_is_not_prepared_is_no_loss():
    model = build_twin(TIED, "sdpa")
    head = HeadLoss(copy.deepcopy(model))

    with pytest.raises(TrainingError, match="not the one that was prepared"):
        head(model, partly_trained())


def test_the_whole_vocabulary_is_never_held_for_more_than_a_chunk(monkeypatch):
    sizes = []
    softmax = torch.log_softmax
    model = build_twin(TIED, "sdpa")
    head = HeadLoss(model, "chunked")

    def noted(logits, *arguments, **options):
        sizes.append(len(logits))
        return softmax(logits, *arguments, **options)

    monkeypatch.setattr(torch, "log_softmax", noted)
    head(model, make_batch(((20, 12),)))

    assert sizes == [8, 8, 8, 6]  # 30 of the 32 tokens are trained


def test_scaled_logits_softcaps_and_other_heads_are_scored_from_all_logits():
    bias = build_twin(TIED, "sdpa")
    bias.lm_head.bias = nn.Parameter(torch.zeros(64))
    whole = adapted(build_twin(UNTIED, "sdpa"), modules_to_save=["lm_head"])
    changed = "this architecture changes the logits after its head"
    cases = [
        (build_twin(GraniteConfig(vocab_size=64, logits_scaling=4.0), "eager"), changed),
        (build_twin(Gemma2Config(vocab_size=64, final_logit_softcapping=3.0), "eager"), changed),
        (bias, "its head has a bias"),
        (whole, "its head is a ModulesToSaveWrapper"),
    ]

    found = [(HeadLoss(model).backend, HeadLoss(model).reason) for model, _ in cases]

    assert found == [("dense", reason) for _, reason in cases]
    for model, _ in cases:
        expected_loss, expected = step(model, partly_trained(), None)
        loss, gradients = step(model, partly_trained(), "auto")
        torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


def test_the_back_end_follows_torch_precision_and_head(monkeypatch):
    model, rows = (dict(models())[name] for name in ("tied", "LoRA and new rows, tied"))
    half = copy.deepcopy(model).to(torch.bfloat16)
    rounds = "torch's own rounds the loss to half precision"

    assert str(HeadLoss(model)) == "fused"
    assert str(HeadLoss(model, half=True)) == str(HeadLoss(half)) == "chunked"
    assert str(HeadLoss(half, "fused")) == f"chunked ({rounds})"
    assert (
        str(HeadLoss(rows, "fused")) == "chunked (some rows of the head are trained by themselves)"
    )
    monkeypatch.delattr("torch.nn.functional.linear_cross_entropy")
    assert str(HeadLoss(model)) == "chunked"
    assert str(HeadLoss(model, "fused")).endswith("has no linear_cross_entropy)")


@pytest.mark.parametrize("wanted", ["fused", "chunked"])
def test_half_precision_keeps_the_digits_of_the_loss(wanted):
    model = build_twin(TIED, varlen.register()).train()
    batch = partly_trained(flat=True)
    exact = HeadLoss(copy.deepcopy(model), "dense")(model, batch)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = HeadLoss(model, wanted)(model, batch)
    loss.backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_without_targets_a_prepared_model_still_gives_logits():
    model = build_twin(TIED, "sdpa")
    before = model(torch.arange(9)[None], use_cache=False).logits

    HeadLoss(model)

    assert torch.equal(model(torch.arange(9)[None], use_cache=False).logits, before)


def test_zero3_gathers_the_weights_of_a_layer_inside_the_head_with_the_head(monkeypatch):
    from deepspeed import zero
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    registered, gathered = [], []
    monkeypatch.setattr(zero, "register_external_parameter", lambda *pair: registered.append(pair))
    head = torch.nn.Linear(2, 2)
    sharded, here, whole = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    for weight, status in ((sharded, "NOT_AVAILABLE"), (here, "AVAILABLE")):
        weight.ds_id, weight.ds_status = 1, ZeroParamStatus[status]
        weight.all_gather = lambda weight=weight: gathered.append(weight)

    head_loss._hold(head, [sharded, here, whole])

    assert [(module, id(weight)) for module, weight in registered] == [
        (head, id(sharded)), (head, id(here))
    ]  # fmt: skip
    assert [id(weight) for weight in gathered] == [id(sharded)]
