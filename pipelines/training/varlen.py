"""Attention over packed documents without a mask: each document is computed by itself.

The batch is one flattened row with its documents' boundaries (`Collator(flat=True)`); they travel
as keyword arguments through the model into every block, so that gradient checkpointing, which
recomputes a block from its saved arguments, sees the same ones. On CUDA the work is done by
torch.nn.attention.varlen (FlashAttention, Dao 2023, arXiv:2307.08691), elsewhere document by
document. Without boundaries it raises: nothing ever attends across documents in silence.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from pipelines.errors import TrainingError

NAME = "starloom_varlen"
HALF = (torch.float16, torch.bfloat16)  # what the kernel computes in
LARGEST_HEAD, HEAD_STEP = 256, 8  # the head sizes it knows


class Kernel(NamedTuple):
    """Torch's varlen_attn, and the names of its parameters, which differ by version."""

    call: Callable[..., Any]
    parameters: frozenset[str]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Kernel":
        """Look at a function once: torch.compile would trace the look with every call."""
        return cls(function, frozenset(inspect.signature(function).parameters))


# Looked for by `register`: torch.compile would break the graph of each block at the search.
_found: dict[str, Kernel | None] = {}


def register() -> str:
    """Register the attention with transformers; return the name to give as attn_implementation."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    _found["kernel"] = cuda_kernel()
    return NAME


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the causal attention within each document, [1, tokens, heads, head size].

    `query` is [1, heads, tokens, head size], `key` and `value` have as many heads or fewer;
    `cu_seq_lens_q` (int32, [documents + 1]) holds where documents begin and the last one ends.
    Raises TrainingError for anything that it would have to ignore.
    """
    _refuse(query, attention_mask, cu_seq_lens_q, dropout, options, module)
    assert cu_seq_lens_q is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = _one_dtype(query, key, value)
    kernel = _found.get("kernel")
    if kernel is not None and query.is_cuda and is_known(query):
        longest = query.shape[2] if max_length_q is None else int(max_length_q)
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        out = run_kernel(kernel, query, key, value, cu_seq_lens_q, longest, scale, sliding_window)
        return out[None], None
    return attend_documents(query, key, value, cu_seq_lens_q, scale, sliding_window), None


def attend_documents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend document by document, on any device and in any dtype; shapes as for `attend`."""
    lengths = cu_seq_lens.diff().tolist()
    if sum(lengths) != query.shape[2]:
        raise TrainingError(
            f"attention {NAME}: documents of {sum(lengths)} tokens in a batch of {query.shape[2]}; "
            "use the collator of pipelines.training.collate"
        )
    heads = query.shape[1]
    key, value = (_with_heads(x, heads, 1) for x in (key, value))
    queries, keys, values = (torch.split(x, lengths, dim=2) for x in (query, key, value))
    outputs = [
        functional.scaled_dot_product_attention(
            q, k, v, scale=scale, **_causal(length, sliding_window, query.device)
        )
        for length, q, k, v in zip(lengths, queries, keys, values, strict=True)
        if length
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def is_known(query: torch.Tensor) -> bool:
    """Return whether the kernel computes in a tensor's dtype and head size (its last dimension)."""
    size = query.shape[-1]
    return query.dtype in HALF and size <= LARGEST_HEAD and size % HEAD_STEP == 0


def run_kernel(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """Call torch's varlen_attn: all tensors are [tokens, heads, head size]."""
    known = kernel.parameters
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            key, value = (_with_heads(x, query.shape[1], 1) for x in (key, value))
    if "window_size" in known:
        options["window_size"] = ((sliding_window or 0) - 1, 0)
    elif sliding_window and sliding_window < longest:
        raise TrainingError(f"attention {NAME}: this torch has no sliding window; use sdpa")
    else:
        options["is_causal"] = True
    if "scale" in known:
        options["scale"] = scale
    elif not math.isclose(scale, query.shape[-1] ** -0.5):
        query = query * (scale * query.shape[-1] ** 0.5)
    out = kernel.call(query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    return out if isinstance(out, torch.Tensor) else out[0]


@functools.cache
def cuda_kernel() -> Kernel | None:
    """Return torch's kernel, or None where this torch or machine has none."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before 2.10
        return None
    return Kernel.of(varlen_attn)


def _refuse(
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    dropout: float,
    options: dict[str, Any],
    module: Any,
) -> None:
    """Raise TrainingError for what this attention cannot honour."""
    ignored = [
        name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None
    ]
    problem = None
    if cu_seq_lens is None:
        problem = "the batch names no document boundaries (cu_seq_lens_q)"
    elif query.shape[0] != 1:
        problem = f"{query.shape[0]} rows in a batch; flatten them to one"
    elif attention_mask is not None:
        problem = "it takes no attention_mask"
    elif dropout:
        problem = f"it has no dropout, and the model asks for {dropout}: set model.dropout: 0"
    elif ignored:
        problem = f"it does not know {', '.join(ignored)}; use model.attn_implementation: eager"
    elif options.get("is_causal") is False or not getattr(module, "is_causal", True):
        problem = "it is causal only"
    if problem:
        raise TrainingError(f"attention {NAME}: {problem}")


def _one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Bring all to the autocast dtype where one is on: rotary embeddings may leave float32."""
    device = tensors[0].device.type
    wanted = tensors[2].dtype
    if wanted == torch.float32 and torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
    return tuple(tensor.to(wanted) for tensor in tensors)


def _with_heads(tensor: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Give keys or values as many heads as the queries; a single one is not copied."""
    found = tensor.shape[dim]
    if found == heads:
        return tensor
    if found == 1:
        shape = list(tensor.shape)
        shape[dim] = heads
        return tensor.expand(shape)
    return tensor.repeat_interleave(heads // found, dim)


def _causal(length: int, sliding_window: int | None, device: torch.device) -> dict[str, Any]:
    if not sliding_window or length <= sliding_window:
        return {"is_causal": True}
    position = torch.arange(length, device=device)
    behind = position[:, None] - position
    return {"attn_mask": (behind >= 0) & (behind < sliding_window)}


def _no_mask(*_: Any, **__: Any) -> None:
    return None
