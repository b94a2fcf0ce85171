"""The loss of a causal model's output head without ever holding all of its logits.

Inside `HeadLoss.scoring` the head of the model returns, in place of logits, the negative log
likelihood of the trained tokens. It is computed where the model calls its head, so that DDP,
DeepSpeed, FSDP, PEFT and torch.autocast see an ordinary forward pass. Untrained positions are left
out before the head's product; the rest goes through in chunks whose gradients are made at once, as
in Liger's fused linear cross entropy (Hsu et al. 2024, arXiv:2410.10989).
"""

import contextlib
import math
import types
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pipelines.errors import TrainingError
from pipelines.training.attention import build_twin
from pipelines.training.collate import IGNORE_INDEX

FUSED, CHUNKED, DENSE = BACKENDS = ("fused", "chunked", "dense")
AUTO = "auto"
TOLERANCE = 1e-4
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

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the nats of these targets from all logits [rows, tokens, vocabulary]."""
        rows = logits.reshape(-1, logits.shape[-1])[self.positions].float()
        return functional.cross_entropy(rows, self.ids, reduction="sum" if self.summed else "none")


_targets: ContextVar[Targets | None] = ContextVar("head_loss_targets", default=None)


class HeadLoss:
    """Computes the loss of one model; `backend` says how, `reason` why not as it was asked for."""

    def __init__(self, model: Any, wanted: str = AUTO, *, half: bool = False) -> None:
        """Prepare a model's head. `wanted` is auto, fused, chunked or dense.

        `half` says that the model will run under torch.autocast, in lower than its own precision.
        """
        self.backend, self.reason = choose_backend(model, wanted, half=half)
        if self.backend != DENSE:
            prepare_head(model.get_output_embeddings(), self.backend)

    def __str__(self) -> str:
        """Return the back-end, and the reason where it is not the one that was asked for."""
        return f"{self.backend} ({self.reason})" if self.reason else self.backend

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
        if self.backend == DENSE:
            return targets.score(logits)
        expected = () if targets.summed else targets.ids.shape
        if logits.shape != expected:
            raise TrainingError(
                f"the model returned {tuple(logits.shape)} instead of a loss of {tuple(expected)}: "
                "its head is not the one that was prepared"
            )
        return logits

    def __call__(self, model: Any, batch: dict[str, Any], *, summed: bool = True) -> torch.Tensor:
        """Return the nats of a batch's trained tokens; `model` may be wrapped (DDP, DeepSpeed)."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        targets = Targets.of(batch["labels"], summed=summed)
        with self.scoring(targets):
            logits = model(**inputs, use_cache=False).logits
        return self.nats(logits, targets)


def choose_backend(model: Any, wanted: str, *, half: bool = False) -> tuple[str, str]:
    """Return the back-end for a model, and why it is not the one that was asked for.

    Anything but a head that is one linear layer, without bias and not followed by a scale or a
    softcap, is scored from all of its logits.
    """
    if wanted == DENSE:
        return DENSE, ""
    head = model.get_output_embeddings()
    reason = _not_plain(head)
    if not reason and not _scores_like_the_model(model.config):
        reason = "this architecture changes the logits after its head"
    if reason:
        return DENSE, reason
    if not isinstance(head, nn.Linear):
        reason = "some rows of the head are trained by themselves"
    elif not hasattr(functional, "linear_cross_entropy"):
        reason = f"torch {torch.__version__} has no linear_cross_entropy"
    elif half or head.weight.dtype != torch.float32:
        reason = "torch's own rounds the loss to half precision"
    elif wanted != CHUNKED:
        return FUSED, ""
    return CHUNKED, reason if wanted == FUSED else ""


def _not_plain(head: Any) -> str:
    """Say why a head is no plain matrix, "" where it is."""
    layer = head if type(head) is nn.Linear else _wrapped_rows(head)
    if layer is None:
        return f"its head is a {type(head).__name__}"
    plain = layer if isinstance(layer, nn.Linear) else layer.base_layer
    if type(plain) is not nn.Linear:
        return f"its head is a {type(plain).__name__}"
    if plain.bias is not None:
        return "its head has a bias"
    if layer is not plain and plain.weight.requires_grad:
        return "its head is trained whole and by rows"
    return ""


def _wrapped_rows(head: Any) -> Any:
    """Return PEFT's layer of rows trained by themselves (trainable_token_indices), or None."""
    layer: Any = getattr(head, "token_adapter", None)
    one = layer is not None and len(layer.active_adapters) == 1
    return layer if one and not layer.disable_adapters and not layer.merged else None


def _scores_like_the_model(config: Any) -> bool:
    """Return whether a small twin has the same loss from its head's states as from its logits."""
    twin = build_twin(config, "eager")
    head = twin.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    inputs = {"input_ids": torch.arange(16)[None], "use_cache": False}
    targets = Targets.of(inputs["input_ids"])
    with torch.no_grad():
        expected = targets.score(twin(**inputs).logits)
        prepare_head(head, CHUNKED)
        token = _targets.set(targets)
        try:
            found = twin(**inputs).logits
        finally:
            _targets.reset(token)
    return found.shape == () and math.isclose(float(found), float(expected), rel_tol=TOLERANCE)


def prepare_head(head: nn.Module, backend: str) -> None:
    """Make a head score while targets are set; without them it stays what it was."""
    score = {FUSED: _score_fused, CHUNKED: _score_chunked}[backend]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(head: Any, hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        targets = _targets.get()
        if targets is None:
            return type(head).forward(head, hidden, *arguments, **options)
        return score(head, hidden.reshape(-1, hidden.shape[-1])[targets.positions], targets)

    head.forward = types.MethodType(forward, head)  # not a closure: a copied model keeps its own


def chunk_size(tokens: int) -> int:
    """Return how many rows of logits are held at a time: about 1/16 of them."""
    rows = -(-tokens // (16 * 128)) * 128
    return min(max(rows, SMALLEST_CHUNK), LARGEST_CHUNK)


def _score_chunked(head: Any, states: torch.Tensor, targets: Targets) -> torch.Tensor:
    layer = _wrapped_rows(head)
    if layer is None:
        return _apply(states, head.weight, None, None, targets)
    (name,) = layer.active_adapters
    weight = layer.base_layer.weight
    rows = layer.trainable_tokens_delta[name]
    numbers = torch.tensor(layer.token_indices[name], device=states.device)
    _hold(head, [weight, rows])
    return _apply(states, weight, rows, numbers, targets)


def _apply(*arguments: Any) -> torch.Tensor:
    *tensors, targets = arguments
    loss: torch.Tensor = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        *tensors, targets.ids, targets.summed
    )
    return loss


def _hold(head: Any, weights: list[Any]) -> None:
    """Let ZeRO-3 gather these weights with the head, forward and backward, as it does the head's.

    Those of a layer inside the head are not its own: that layer is never called.
    """
    sharded = [weight for weight in weights if hasattr(weight, "ds_id")]
    if not sharded:
        return
    from deepspeed import zero
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for weight in sharded:
        zero.register_external_parameter(head, weight)
        if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE:  # the first time
            weight.all_gather()


def _score_fused(head: Any, states: torch.Tensor, targets: Targets) -> torch.Tensor:
    if _compute_dtype(states) != torch.float32 or not len(states):
        return _score_chunked(head, states, targets)
    return functional.linear_cross_entropy(
        states,
        head.weight,
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
        ctx: Any,
        states: torch.Tensor,
        weight: torch.Tensor,
        trained: torch.Tensor | None,
        numbers: torch.Tensor | None,
        ids: torch.Tensor,
        summed: bool,
    ) -> torch.Tensor:
        """Return nats in float32: [] if `summed`, else [tokens] (and then no gradients).

        `states` is [tokens, width], `weight` [vocabulary, width], `ids` [tokens]. Where `trained`
        [rows, width] is given, it takes the place of the weight's rows `numbers`, and `weight` is
        frozen.
        """
        wanted = [summed and needed for needed in ctx.needs_input_grad[:3]]
        dtype = _compute_dtype(states)
        with torch.autocast(states.device.type, enabled=False):
            rows = None if trained is None else trained.to(dtype)
            head = _Chunks(states.to(dtype), weight.to(dtype), rows, numbers, wanted)
            parts = [
                head.add(slice(start, start + head.size), ids)
                for start in range(0, len(states), head.size)
            ]
        ctx.save_for_backward(
            *(
                None if gradient is None or tensor is None else gradient.to(tensor.dtype)
                for gradient, tensor in zip(head.gradients, (states, weight, trained), strict=True)
            )
        )
        nats = torch.cat(parts) if parts else states.new_zeros(0, dtype=torch.float32)
        return nats.sum() if summed else nats

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scale the gradients that `forward` made."""
        made = [None if gradient is None else gradient * grad for gradient in ctx.saved_tensors]
        return (*made, None, None, None)


class _Chunks:
    """The head's products on part of the states, and the gradients of the sum of their losses."""

    def __init__(
        self, states: Any, weight: Any, trained: Any, numbers: Any, wanted: list[bool]
    ) -> None:
        self._states, self._weight, self._trained, self._numbers = states, weight, trained, numbers
        self.size = chunk_size(len(states))
        self.gradients = [
            torch.empty_like(states) if wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None,
            torch.zeros_like(trained, dtype=torch.float32) if wanted[2] else None,
        ]

    def add(self, part: slice, ids: torch.Tensor) -> torch.Tensor:
        """Return the nats of a part's ids and add up the gradients."""
        states, target = self._states[part], ids[part, None]
        logits = states @ self._weight.T
        if self._numbers is not None:
            logits[:, self._numbers] = states @ self._trained.T
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        found = logs.gather(1, target)
        to_states, to_weight, to_trained = self.gradients
        if not all(gradient is None for gradient in self.gradients):
            # The gradient to the logits is p, and p - 1 at the target: expm1 keeps it exact there.
            slope = logs.exp_().scatter_(1, target, found.expm1()).to(states.dtype)
            if to_weight is not None:
                _add_product(to_weight, slope, states)
            if self._numbers is not None:
                ours = slope[:, self._numbers]
                slope[:, self._numbers] = 0
                if to_trained is not None:
                    _add_product(to_trained, ours, states)
            if to_states is not None:
                torch.mm(slope, self._weight, out=to_states[part])
                if self._numbers is not None:
                    to_states[part] += ours @ self._trained
        return -found[:, 0]


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
