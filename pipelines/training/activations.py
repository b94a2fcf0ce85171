"""Bytes that one token keeps from the forward pass until its gradient is taken.

Counted tensor by tensor, as autograd saves them (Korthikanti et al., arXiv 2205.05198, count
likewise for GPT); a test compares the counts with what torch saves. Widths are elements per token.
"""

from dataclasses import dataclass

from pipelines.training.shapes import Shape
from pipelines.training_settings import Adapter

# A dense cross entropy holds the log-probabilities, the gradient of the loss by them and that by
# the logits, each in float32; torch has no fused one.
DENSE_HEAD_BYTES = 12


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a number in matrix products, in the residual stream, and whether autocast casts.

    Under autocast each matrix product casts its own copy of an input that is float32, and keeps a
    copy of trained float32 weights.
    """

    compute: int
    stream: int
    autocast: bool
    on_cuda: bool = True


def block_bytes(
    shape: Shape, numbers: Numbers, row: int, attention: str, adapter: Adapter | None
) -> int:
    """Return what one block saves for a token of a row (or flat batch) of `row` tokens."""
    saved = dict.fromkeys(shape.linear_layers, True)
    if adapter is not None:
        targets = shape.targets(adapter.target_modules)
        saved = {name: name in targets for name in shape.linear_layers}
    total = 2 * _norm_bytes(shape, numbers, frozen=adapter is not None)
    total += _input_bytes(shape, numbers, saved, adapted=adapter is not None)
    total += _attention_bytes(shape, numbers, row, attention)
    total += _mlp_bytes(shape, numbers, saved)
    if adapter is not None:
        total += _adapter_bytes(shape, numbers, adapter)
    return total


def _norm_bytes(shape: Shape, numbers: Numbers, *, frozen: bool) -> int:
    """Count the input of a norm and its statistics; an RMSNorm computes and saves in float32."""
    d = shape.hidden
    if shape.gated:
        return 4 * d + (0 if frozen else numbers.stream * d) + 4
    # On CUDA autocast takes a LayerNorm in float32, so that it saves a cast copy of its input.
    return d * (4 if numbers.autocast and numbers.on_cuda else numbers.stream) + 8


def _input_bytes(shape: Shape, numbers: Numbers, saved: dict[str, bool], *, adapted: bool) -> int:
    """Count the inputs of the attention's and the MLP's first matrices: norms' outputs."""
    first = [name for name in saved if name.endswith(("c_attn", "q_proj", "k_proj", "v_proj"))]
    second = [name for name in saved if name.endswith(("c_fc", "gate_proj", "up_proj"))]
    copied = numbers.autocast and (adapted or numbers.stream == 4)
    copied = copied or (numbers.autocast and numbers.on_cuda and not shape.gated)
    total = 0
    for names in (first, second):
        users = sum(saved[name] for name in names)
        total += (users if copied else min(users, 1)) * shape.hidden * numbers.compute
    return total


def _attention_bytes(shape: Shape, numbers: Numbers, row: int, attention: str) -> int:
    """Count queries, keys, values, the output and what the kernel saves."""
    size, q, kv = numbers.compute, shape.query, shape.key
    # One key head for all is a view; several are copied for every query head, unless varlen.
    repeated = shape.kv_heads > 1 and shape.kv_heads < shape.heads and "varlen" not in attention
    keys = 2 * (q if repeated else kv)
    if attention == "eager":
        scores = shape.heads * row * (4 + (size if size < 4 else 0))
        return size * (3 * q + keys + 2 * kv) + scores
    mask = 0 if "varlen" in attention or "flash" in attention else row * size
    return size * (2 * q + keys) + mask + 4 * shape.heads


def _mlp_bytes(shape: Shape, numbers: Numbers, saved: dict[str, bool]) -> int:
    last = [name for name in saved if name.endswith(("mlp.c_proj", "down_proj"))]
    inner = (3 if shape.gated else 1) + saved[last[0]]
    return inner * shape.inner * numbers.compute


def _adapter_bytes(shape: Shape, numbers: Numbers, adapter: Adapter) -> int:
    """Count the narrow products; dropout's inputs; DoRA's two outputs of each layer."""
    total = 0
    for name in shape.targets(adapter.target_modules):
        wide, tall = shape.linear_layers[name]
        total += adapter.r * numbers.compute
        if numbers.autocast and name.endswith(("attn.c_proj", "o_proj")):
            total += wide * numbers.compute  # cast again, beside what attention saved
        if adapter.lora_dropout:
            total += wide * (1 if numbers.on_cuda else 4) + wide * 4
        if adapter.use_dora:
            total += 2 * tall * numbers.compute
    return total
