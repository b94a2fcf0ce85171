"""Attention over packed documents: by itself, in models, and what it refuses."""

import pytest
import torch
from transformers import GPTBigCodeConfig, LlamaConfig, Qwen2Config, Starcoder2Config

from pipelines.errors import TrainingError
from pipelines.training import varlen
from pipelines.training.attention import build_twin
from tests.assets.packed_batches import make_batch

CONFIGS = [
    GPTBigCodeConfig(vocab_size=64),
    Starcoder2Config(vocab_size=64, sliding_window=4),
    LlamaConfig(vocab_size=64),
    Qwen2Config(vocab_size=64),
]
BOUNDARIES = torch.tensor([0, 5, 6, 14], dtype=torch.int32)


def tensors(heads=4, key_heads=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, 14, 8, generator=generator) for count in (heads, key_heads, key_heads)
    ]


def reference(query, key, value, scale, window=None):
    """Return masked attention, written out."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    document = torch.bucketize(torch.arange(14), BOUNDARIES[1:], right=True)
    behind = torch.arange(14)[:, None] - torch.arange(14)
    allowed = (document[:, None] == document) & (behind >= 0) & (behind < (window or 14))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_each_document_attends_to_itself_only(key_heads, window):
    query, key, value = tensors(key_heads=key_heads)

    out, _ = varlen.attend(
        None, query, key, value, None, scaling=0.3, cu_seq_lens_q=BOUNDARIES, sliding_window=window
    )

    torch.testing.assert_close(out, reference(query, key, value, 0.3, window))


def kernel_of_torch_2_13(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                         enable_gqa=False):  # fmt: skip
    assert (max_q, max_k, window_size[1]) == (8, 8, 0)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return by_hand(q, k, v, cu_q, scale, window_size[0] + 1)


def kernel_of_torch_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert q.shape == k.shape
    return by_hand(q, k, v, cu_q, scale, window_size[0] + 1)


def kernel_of_torch_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    assert is_causal
    return by_hand(q, k, v, cu_q, q.shape[-1] ** -0.5, None), "and more"


def by_hand(q, k, v, cu_seq_lens, scale, window):
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    return varlen.attend_documents(*parts, cu_seq_lens, scale, window or None)[0]


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "window"),
    [
        (kernel_of_torch_2_13, None),
        (kernel_of_torch_2_13, 3),
        (kernel_of_torch_2_11, 3),
        (kernel_of_torch_2_10, None),
    ],
)
def test_the_kernel_of_every_torch_is_called_for_the_same_attention(kernel, window, key_heads):
    query, key, value = tensors(key_heads=key_heads)

    out = varlen.run_kernel(
        varlen.Kernel.of(kernel),
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        BOUNDARIES,
        8,
        0.3,
        window,
    )

    torch.testing.assert_close(out, reference(query, key, value, 0.3, window)[0])


@pytest.mark.parametrize(
    ("dtype", "size", "known"),
    [
        (torch.bfloat16, 128, True),
        (torch.float16, 80, True),
        (torch.bfloat16, 256, True),
        (torch.bfloat16, 264, False),
        (torch.bfloat16, 100, False),
        (torch.float32, 128, False),
    ],
)
def test_what_the_kernel_cannot_compute_goes_document_by_document(monkeypatch, dtype, size, known):
    class OnCuda(torch.Tensor):
        is_cuda = True

    called = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, enable_gqa=False):
        called.append(q.shape)
        return q

    monkeypatch.setitem(varlen._found, "kernel", varlen.Kernel.of(kernel))
    query, key, value = (torch.randn(1, 2, 14, size, dtype=dtype) for _ in range(3))

    out, _ = varlen.attend(
        None, query.as_subclass(OnCuda), key, value, None, cu_seq_lens_q=BOUNDARIES
    )

    assert called == ([(14, 2, size)] if known else [])
    assert out.shape == (1, 14, 2, size)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_models_have_the_gradients_of_masked_attention(config, checkpointing):
    gradients = []
    for name in (varlen.register(), "sdpa"):
        model = build_twin(config, name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = make_batch(((5, 9, 3), (7, 4)), flat=name != "sdpa")
        model(**batch, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})

    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cu_seq_lens_q": None}, "names no document boundaries"),
        ({"dropout": 0.1}, "no dropout, and the model asks for 0.1"),
        ({"attention_mask": torch.ones(1, 14)}, "takes no attention_mask"),
        ({"softcap": 30.0}, "does not know softcap"),
        ({"is_causal": False}, "causal only"),
        ({"cu_seq_lens_q": BOUNDARIES[:-1]}, "documents of 6 tokens in a batch of 14"),
    ],
)
def test_what_it_cannot_honour_is_refused(change, reason):
    query, key, value = tensors()
    options = {"attention_mask": None, "cu_seq_lens_q": BOUNDARIES} | change

    with pytest.raises(TrainingError, match=reason):
        varlen.attend(None, query, key, value, **options)


def test_rows_that_are_not_flattened_are_refused():
    query, key, value = (torch.cat([x, x]) for x in tensors())

    with pytest.raises(TrainingError, match="2 rows in a batch; flatten them"):
        varlen.attend(None, query, key, value, None, cu_seq_lens_q=BOUNDARIES)


def test_a_model_without_boundaries_stops_instead_of_mixing():
    model = build_twin(CONFIGS[0], varlen.register())

    with pytest.raises(TrainingError, match="names no document boundaries"):
        model(input_ids=torch.arange(8)[None], use_cache=False)
