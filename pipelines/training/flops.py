"""Floating-point operations of a model, counted from its own layers, and the peak of its device.

A matrix of n weights takes 2n operations per token forwards, 2n for the gradient of its input and
2n for that of its weights (Kaplan et al., arXiv 2001.08361, appendix B; attention and MFU as in
PaLM, arXiv 2204.02311, appendix B). Counted from the layers, so that a gated MLP, grouped
queries, a tied head (computed, though no parameters of its own) and adapters are right by
themselves; embeddings are looked up and count nothing.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

PEAK_VARIABLE = "STARLOOM_PEAK_TFLOPS"
TERA = 1e12
# Dense TFLOP/s by device name, the first match counts: bfloat16, and float32 without TF32, which
# is torch's default. From the vendors' data sheets; those count sparsity twice, this does not.
PEAK_TFLOPS = (
    ("B200", 2250.0, 75.0),
    ("GH200", 989.4, 66.9),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.4, 66.9),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIE", 756.0, 51.2),
    ("H100", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A10G", 70.0, 31.5),
    ("A10", 125.0, 31.2),
    ("A40", 149.7, 37.4),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("RTX 6000 ADA", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090", 71.2, 35.6),
    ("MI300X", 1307.4, 163.4),
    ("MI250", 383.0, 95.7),
)


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a training step: per token, and per (query, key) pair of causal attention.

    `recomputed_*` is what gradient checkpointing adds; MFU leaves it out, HFU counts it.
    """

    per_token: int
    per_pair: int
    recomputed_per_token: int = 0
    recomputed_per_pair: int = 0

    def of(self, tokens: int, pairs: int, *, recomputed: bool = False) -> float:
        """Return the operations of a number of tokens that attend to `pairs` keys in all."""
        total = float(tokens * self.per_token + pairs * self.per_pair)
        if recomputed:
            total += tokens * self.recomputed_per_token + pairs * self.recomputed_per_pair
        return total


@dataclass(frozen=True, slots=True)
class Speed:
    """Turns counts into utilisation: `peak` is FLOP/s of all devices together, None if unknown."""

    flops: Flops
    peak: float | None

    def utilization(self, tokens: int, pairs: int, seconds: float) -> dict[str, float | None]:
        """Return mfu and hfu, shares of the peak; None where it is not known."""
        if self.peak is None or seconds <= 0:
            return {"mfu": None, "hfu": None}
        whole = seconds * self.peak
        return {
            "mfu": round(self.flops.of(tokens, pairs) / whole, 4),
            "hfu": round(self.flops.of(tokens, pairs, recomputed=True) / whole, 4),
        }


def count_flops(model: Any, *, gradient_checkpointing: bool = False) -> Flops:
    """Return the operations of a whole (not yet sharded) causal model, with its adapter if any.

    A frozen matrix has no gradient of its weights: 4 operations per weight instead of 6, which is
    what makes LoRA cheaper. Checkpointing runs each block forwards once more, the head not.
    """
    head = model.get_output_embeddings()
    per_token = recomputed = 0
    for module in model.modules():
        weights = _matrix_size(module)
        per_token += weights * (6 if module.weight.requires_grad else 4) if weights else 0
        recomputed += 2 * weights if module is not head else 0
    # Scores and their sum over values: two products of 2 x width each, and twice that backwards.
    width = _attention_width(model.config)
    return Flops(
        per_token,
        12 * width,
        recomputed if gradient_checkpointing else 0,
        4 * width if gradient_checkpointing else 0,
    )


def find_peak(device: str | None, dtype: str, configured: float | None = None) -> float | None:
    """Return the peak FLOP/s of a device by name, None on CPU (no name) or where it is unknown.

    STARLOOM_PEAK_TFLOPS, then the hardware file's peak_tflops, replace the table.
    """
    given = _from_environment() or configured
    if given is not None:
        return given * TERA
    if device is None:
        return None
    for name, bfloat16, float32 in PEAK_TFLOPS:
        if name in device.upper():
            return (bfloat16 if dtype == "bfloat16" else float32) * TERA
    logger.warning(
        "no peak FLOP/s is known for %r, so no MFU is reported; set peak_tflops in the hardware "
        "file or %s", device, PEAK_VARIABLE,
    )  # fmt: skip
    return None


def _from_environment() -> float | None:
    text = os.environ.get(PEAK_VARIABLE, "")
    try:
        value = float(text) if text else 0.0
    except ValueError:
        value = -1.0
    if value < 0:
        logger.warning("%s=%r is no number of TFLOP/s: ignored", PEAK_VARIABLE, text)
    return value if value > 0 else None


def _matrix_size(module: Any) -> int:
    """Return the weights of a module that multiplies each token by a matrix; 0 for all others."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, (torch.nn.Linear, Conv1D)):
        return 0
    if hasattr(module, "in_features"):  # in 4 bit the weight itself has another shape
        return int(module.in_features) * int(module.out_features)
    return int(module.weight.numel())


def _attention_width(config: Any) -> int:
    """Return the width of all query heads of all layers."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers * heads * head)
