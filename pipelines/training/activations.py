"""Bytes that one token keeps from the forward pass until its gradient is taken.

Counted tensor by tensor, as autograd saves them (Korthikanti et al., arXiv 2205.05198, count
likewise for GPT); a test compares the counts with what torch saves. Widths are elements per token.
"""

from dataclasses import dataclass

from pipelines.settings.training import Adapter
from pipelines.training.shapes import Shape

# Bytes for each logit. Of all logits at once: those of trained tokens picked, their
# log-probabilities, the gradients of the loss by either, in float32. Of a chunk: the logits and
# their log-probabilities, which become the gradient.
DENSE_HEAD_BYTES, CHUNK_HEAD_BYTES = 16, 8
SMALLEST_CHUNK, LARGEST_CHUNK = 256, 4096  # as in head_loss, which needs torch


@dataclass(frozen=True, slots=True)
class Numbers:
    """Bytes of a number in matrix products, in the residual stream, and whether autocast casts.

    Under autocast each matrix product casts its own copy of an input that is float32, and keeps a
    copy of trained float32 weights. `dropout` is that of the model, not of an adapter, `bits` the
    width of a quantized base.
    """

    compute: int
    stream: int
    autocast: bool
    on_cuda: bool = True
    dropout: bool = False
    bits: int = 0


def block_bytes(
    shape: Shape, numbers: Numbers, row: int, attention: str, adapter: Adapter | None
) -> int:
    """Return what one block saves for a token of a row (or flat batch) of `row` tokens."""
    saved = dict.fromkeys(shape.linear_layers, True)
    if adapter is not None:
        targets = shape.targets(adapter.target_modules)
        saved = {name: name in targets or numbers.bits == 8 for name in shape.linear_layers}
    total = 2 * _norm_bytes(shape, numbers, frozen=adapter is not None)
    total += _input_bytes(shape, numbers, saved, adapter)
    total += _attention_bytes(shape, numbers, row, attention)
    total += _mlp_bytes(shape, numbers, saved)
    if numbers.dropout and not shape.gated:
        total += 2 * shape.hidden * (1 if numbers.on_cuda else 4)
    if adapter is not None:
        total += _adapter_bytes(shape, numbers, adapter)
    if numbers.bits == 8 and numbers.autocast:
        # Beside the copies that the adapter's products cast, also from half precision.
        total += 2 * shape.hidden * 4 + shape.inner * _width_between(numbers)
    return total


def kept_bytes(shape: Shape, numbers: Numbers) -> int:
    """Return what one block keeps of a token although it is recomputed.

    An 8-bit layer holds its input where autograd's hooks, and so checkpointing, do not find it.
    """
    if numbers.bits != 8:
        return 0
    norms = 2 * shape.hidden * (4 if numbers.autocast else numbers.compute)
    return norms + shape.query * numbers.compute + shape.inner * _width_between(numbers)


def _norm_bytes(shape: Shape, numbers: Numbers, *, frozen: bool) -> int:
    """Count the input of a norm and its statistics; an RMSNorm computes and saves in float32."""
    d = shape.hidden
    if shape.gated:
        return 4 * d + (0 if frozen else numbers.stream * d) + 4
    # On CUDA autocast takes a LayerNorm in float32, so that it saves a cast copy of its input.
    return d * (4 if numbers.autocast and numbers.on_cuda else numbers.stream) + 8


def _input_bytes(
    shape: Shape, numbers: Numbers, saved: dict[str, bool], adapter: Adapter | None
) -> int:
    """Count the inputs of the attention's and the MLP's first matrices: norms' outputs."""
    first = [name for name in saved if name.endswith(("c_attn", "q_proj", "k_proj", "v_proj"))]
    second = [name for name in saved if name.endswith(("c_fc", "gate_proj", "up_proj"))]
    copied = numbers.autocast and (adapter is not None or numbers.stream == 4)
    copied = copied or (adapter is not None and adapter.lora_dropout > 0)
    copied = copied or (numbers.autocast and numbers.on_cuda and not shape.gated)
    total = 0
    for names in (first, second):
        users = sum(saved[name] for name in names)
        total += (users if copied else min(users, 1)) * shape.hidden * numbers.compute
    return total


def _attention_bytes(shape: Shape, numbers: Numbers, row: int, attention: str) -> int:
    """Count queries, keys, values, the output and what the kernel saves."""
    size, q, kv = numbers.compute, shape.query, shape.key
    # One key head for all is a view; several are copied for every query head.
    repeated = 1 < shape.kv_heads < shape.heads
    keys = 2 * (q if repeated else kv)
    if attention == "eager":
        scores = shape.heads * row * (4 + (size if size < 4 else 0))
        return size * (3 * q + keys + 2 * kv) + scores
    if attention == "varlen":  # on CPU document by document, then joined
        return size * (q * (2 if numbers.on_cuda else 3) + keys) + 4 * shape.heads
    # The fused CPU kernel has no dropout: then the scores are kept.
    scores = 3 * shape.heads * row * size if numbers.dropout and not numbers.on_cuda else 0
    return size * (2 * q + keys) + row * size + 4 * shape.heads + scores


def _mlp_bytes(shape: Shape, numbers: Numbers, saved: dict[str, bool]) -> int:
    last = [name for name in saved if name.endswith(("mlp.c_proj", "down_proj"))]
    between = (3 if shape.gated else 1) * _width_between(numbers)
    return shape.inner * (between + saved[last[0]] * numbers.compute)


def _width_between(numbers: Numbers) -> int:
    """Return the bytes of a number between the matrices of an MLP.

    A quantized layer returns what it was given, float32 after a norm; in 8 bit that of the CPU does
    not.
    """
    kept = numbers.bits == 4 or (numbers.bits == 8 and numbers.on_cuda)
    return 4 if numbers.autocast and kept else numbers.compute


def _adapter_bytes(shape: Shape, numbers: Numbers, adapter: Adapter) -> int:
    """Count the narrow products; dropout's inputs; DoRA's two outputs of each layer."""
    total = 0
    for name in shape.targets(adapter.target_modules):
        wide, tall = shape.linear_layers[name]
        total += adapter.r * numbers.compute
        if numbers.autocast and name.endswith(("attn.c_proj", "o_proj")):
            total += wide * numbers.compute  # cast again, beside what attention saved
        if adapter.lora_dropout:
            total += wide * (1 if numbers.on_cuda else 4)
        if adapter.use_dora:
            total += 2 * tall * numbers.compute
    return total


def chunk_size(tokens: int) -> int:
    """Return how many rows of logits a chunked head holds at a time, as `head_loss` chooses."""
    rows = -(-tokens // (16 * 128)) * 128
    return min(max(rows, SMALLEST_CHUNK), LARGEST_CHUNK)
