"""What the GPU benchmark measures: the models, and each arm with what it changes.

An arm differs from the one above it in one thing, so that the table shows what each is worth.
"""

from dataclasses import dataclass, replace
from typing import Any

CONTROL_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """A GPTBigCode model from random weights, and the length of its rows."""

    n_layer: int
    n_embd: int
    n_head: int
    vocabulary: int = 49_152
    positions: int = 8192
    block: int = 2048

    def config(self, dropout: float) -> Any:
        """Return the transformers config, with one rate for all dropouts."""
        from transformers import GPTBigCodeConfig

        return GPTBigCodeConfig(
            vocab_size=self.vocabulary, n_positions=self.positions, n_embd=self.n_embd,
            n_layer=self.n_layer, n_head=self.n_head, multi_query=True, use_cache=False,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **CONTROL_TOKENS,
        )  # fmt: skip


SHAPES = {
    "1b": Shape(24, 2048, 16),
    "15b": Shape(40, 6144, 48),
    "tiny": Shape(2, 64, 4, vocabulary=512, positions=128, block=128),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One line of the table.

    `rows` is the micro-batch: packed rows of 2,048 tokens, or padded documents. `precision` is
    `autocast` (trained weights in float32, matrix products in bfloat16) or `master` (weights in
    bfloat16, float32 copies in the optimizer, as DeepSpeed's ZeRO keeps them); a frozen base is in
    bfloat16 always. `loop` is `bare`, `script` (transformers' Trainer, padded, as the seeds have
    it) or `starloom` (PackedTrainer).
    """

    name: str
    title: str
    shape: str
    rows: int
    accumulation: int = 1
    loop: str = "bare"
    attention: str = "sdpa"
    head: str = "dense"
    compiled: bool = False
    dropout: float = 0.1
    fused: bool = False
    precision: str = "autocast"
    lora: bool = False
    checkpointing: bool = False
    seconds: int = 60  # about what it takes on an H200

    @property
    def is_ceiling(self) -> bool:
        """Return whether the arm measures matrix products and no model."""
        return self.loop == "ceiling"


def _ladder(first: Arm, *steps: tuple[str, str, dict[str, Any]]) -> list[Arm]:
    """Return arms each of which keeps what the one before has, and changes something."""
    arms = [first]
    for name, title, changes in steps:
        arms.append(replace(arms[-1], name=name, title=title, **changes))
    return arms


_FULL = _ladder(
    Arm("1b-sdpa", "packed rows, masked sdpa", "1b", rows=16, accumulation=2),
    ("1b-varlen", "+ varlen attention (no attention dropout)", {"attention": "varlen"}),
    ("1b-head", "+ chunked head loss", {"head": "chunked"}),
    ("1b-compile", "+ torch.compile of each block", {"compiled": True, "seconds": 120}),
    ("1b-dropout", "+ no dropout", {"dropout": 0.0}),
    ("1b-fused", "+ fused AdamW", {"fused": True}),
    ("1b-master", "+ bfloat16 weights, float32 master", {"precision": "master"}),
    ("1b-rows", "+ 65,536 tokens a micro-step", {"rows": 32, "accumulation": 1}),
)
_LORA = _ladder(
    Arm("15b-sdpa", "packed rows, masked sdpa", "15b", rows=4, lora=True, seconds=100),
    (
        "15b-varlen", "+ varlen attention, chunked head loss, no dropout",
        {"attention": "varlen", "head": "chunked", "dropout": 0.0},
    ),
    ("15b-compile", "+ torch.compile of each block", {"compiled": True, "seconds": 160}),
    ("15b-fused", "+ fused AdamW, bfloat16 adapter, float32 master",
     {"fused": True, "precision": "master"}),
    ("15b-checkpointing", "the same with gradient checkpointing", {"checkpointing": True}),
)  # fmt: skip

ARMS = {
    arm.name: arm
    for arm in (
        Arm("ceiling", "matrix products and copies", "tiny", 0, loop="ceiling", seconds=40),
        Arm(
            "1b-script", "seed's script: padded to the longest, 8 documents", "1b", rows=8,
            accumulation=4, loop="script",
        ),
        *_FULL,
        Arm(
            "1b-starloom", "starloom: what `starloom run` trains with", "1b", rows=16,
            accumulation=2, loop="starloom", dropout=0.0, seconds=120,
        ),
        Arm(
            "1b-starloom-compile", "starloom with `training.torch_compile: true`", "1b", rows=16,
            accumulation=2, loop="starloom", compiled=True, dropout=0.0, seconds=180,
        ),
        *_LORA,
        Arm(
            "15b-script", "seed's script: padded to the longest, 4 documents", "15b", rows=4,
            accumulation=4, loop="script", lora=True, checkpointing=True, seconds=120,
        ),
    )
}  # fmt: skip


def dry(arm: Arm) -> Arm:
    """Return an arm on a tiny model, for the CPU."""
    return replace(arm, shape="tiny", rows=min(arm.rows, 4))
