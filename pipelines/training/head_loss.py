"""The loss of a causal model's output head without ever holding all of its logits.

Inside `HeadLoss.scoring` the head of the model returns, in place of logits, the negative log
likelihood of the trained tokens. It is computed where the model calls its head, so that DDP,
DeepSpeed, FSDP, PEFT and torch.autocast see an ordinary forward pass. Untrained positions are left
out before the head's product; the rest goes through in chunks whose gradients are made at once, as
in Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989).
"""

import contextlib
import logging
import types
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipelines.training.collate import IGNORE_INDEX

logger = logging.getLogger(__name__)

FUSED, CHUNKED, DENSE = BACKENDS = ("fused", "chunked", "dense")
AUTO = "auto"
SMALLEST_CHUNK, LARGEST_CHUNK = 256, 4096  # rows of logits


@dataclass(frozen=True, slots=True)
class Targets:
    """The trained tokens of a batch: which hidden states (flat) predict them, and their ids."""

    positions: torch.Tensor
    ids: torch.Tensor
    summed: bool = True

    @classmethod
    def of(cls, labels: torch.Tensor, *, summed: bool = True) -> "Targets":
        """Return those of labels [rows, tokens]: the token at i is predicted at i - 1."""
        shifted = functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
        positions = (shifted != IGNORE_INDEX).nonzero()[:, 0]
        return cls(positions, shifted[positions], summed)


_targets: ContextVar[Targets | None] = ContextVar("head_loss_targets", default=None)


class HeadLoss:
    """Computes the loss of one model; `backend` says how, `reason` why not as it was asked for."""

    def __init__(self, model: Any, wanted: str = AUTO) -> None:
        """Prepare a model's head. `wanted` is auto, fused, chunked or dense."""
        self.backend, self.reason = choose_backend(model, wanted)
        logger.info("head loss: %s%s", self.backend, f" ({self.reason})" * bool(self.reason))
        if self.backend != DENSE:
            prepare_head(model.get_output_embeddings(), self.backend)

    @contextlib.contextmanager
    def scoring(self, targets: Targets) -> Iterator[None]:
        """Let the head score these targets: call the model within, without labels."""
        token = _targets.set(None if self.backend == DENSE else targets)
        try:
            yield
        finally:
            _targets.reset(token)

    def nats(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Return nats from what the model returned as logits: their sum, or one per target."""
        if self.backend != DENSE:
            return logits
        rows = logits.reshape(-1, logits.shape[-1])[targets.positions].float()
        reduction = "sum" if targets.summed else "none"
        return functional.cross_entropy(rows, targets.ids, reduction=reduction)

    def __call__(self, model: Any, batch: dict[str, Any], *, summed: bool = True) -> torch.Tensor:
        """Return the nats of a batch's trained tokens; `model` may be wrapped (DDP, DeepSpeed)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = Targets.of(batch["labels"], summed=summed)
        with self.scoring(targets):
            logits = model(**inputs, use_cache=False).logits
        return self.nats(logits, targets)


def choose_backend(model: Any, wanted: str) -> tuple[str, str]:
    """Return the back-end for a model, and why it is not the one that was asked for."""
    if wanted == DENSE:
        return DENSE, ""
    if type(model.get_output_embeddings()) is not nn.Linear:
        return DENSE, "its head is not one linear layer"
    return CHUNKED if wanted == AUTO else wanted, ""


def prepare_head(head: nn.Module, backend: str) -> None:
    """Make a head score while targets are set; without them it stays what it was."""
    score = {FUSED: _score_fused, CHUNKED: _score_chunked}[backend]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(head: Any, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        targets = _targets.get()
        if targets is None:
            return type(head).forward(head, hidden, *arguments, **options)
        return score(head, hidden.reshape(-1, hidden.shape[-1])[targets.positions], targets)

    head.forward = types.MethodType(forward, head)


def chunk_size(tokens: int) -> int:
    """Return how many rows of logits are held at a time: about 1/16 of them."""
    rows = -(-tokens // (16 * 128)) * 128
    return min(max(rows, SMALLEST_CHUNK), LARGEST_CHUNK)


def _score_chunked(head: Any, states: torch.Tensor, targets: Targets) -> torch.Tensor:
    loss: torch.Tensor = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        states, head.weight, targets.ids, targets.summed
    )
    return loss


def _score_fused(head: Any, states: torch.Tensor, targets: Targets) -> torch.Tensor:
    dtype = _compute_dtype(states)
    with torch.autocast(states.device.type, enabled=False):
        return functional.linear_cross_entropy(
            states.to(dtype),
            head.weight.to(dtype),
            targets.ids,
            reduction="sum" if targets.summed else "none",
            options=nn.LinearCrossEntropyOptions(
                batch_chunk_size=chunk_size(len(states)), chunking_method=None
            ),
        )


class ChunkedLoss(torch.autograd.Function):
    """Negative log likelihood of ids under softmax(states @ weight.T), a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, summed: bool
    ) -> torch.Tensor:
        """Return nats in float32: [] if `summed`, else [tokens] (and then no gradients).

        `states` is [tokens, width], `weight` [vocabulary, width], `ids` [tokens].
        """
        to_states, to_weight = (summed and needed for needed in ctx.needs_input_grad[:2])
        dtype = _compute_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            rows, matrix = states.to(dtype), weight.to(dtype)
            grad_states = torch.empty_like(rows) if to_states else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
            parts = []
            size = chunk_size(len(rows))
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                target = ids[part, None]
                logs = torch.log_softmax(rows[part] @ matrix.T, -1, dtype=torch.float32)
                found = logs.gather(1, target)
                parts.append(-found[:, 0])
                if not (to_states or to_weight):
                    continue
                # The gradient to the logits is p - 1 at the target: expm1 keeps it exact near 0.
                slope = logs.exp_().scatter_(1, target, found.expm1()).to(dtype)
                if grad_states is not None:
                    torch.mm(slope, matrix, out=grad_states[part])
                if grad_weight is not None:
                    _add_product(grad_weight, slope, rows[part])
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.dtypes = states.dtype, weight.dtype
        nats = torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)
        return nats.sum() if summed else nats

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that `forward` made."""
        found = [
            None if gradient is None else (gradient * grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*found, None, None)


def _add_product(total: torch.Tensor, slope: torch.Tensor, rows: torch.Tensor) -> None:
    """Add slope.T @ rows in float32."""
    if slope.dtype == torch.float32:
        total.addmm_(slope.T, rows)
    else:
        total.add_(slope.T @ rows)


def _compute_dtype(states: torch.Tensor) -> torch.dtype:
    """Return the dtype of the head's products, as nn.Linear would choose it."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
