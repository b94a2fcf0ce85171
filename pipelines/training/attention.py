"""Packed documents must not attend to each other: the numeric check that they do not.

transformers builds a block-diagonal mask from restarting position_ids only without an
attention_mask and without a cache, and not for every architecture and attention implementation;
where it does not, training goes on silently with mixed documents. So it is measured.
"""

import copy
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pipelines.errors import TrainingError
from pipelines.training.collate import IGNORE_INDEX, Collator, PackedRow

TOLERANCE = 1e-4  # float32 noise is about 1e-6, mixed documents differ by more than 0.1
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "n_inner": 128, "vocab_size": 64,
}  # fmt: skip


def check_packing(model: Any, device: torch.device | str) -> None:
    """Raise TrainingError unless this kind of model keeps packed documents apart on a device.

    The check runs a small float32 twin with random weights: the same architecture and attention.
    """
    twin = build_twin(model.config, model.config._attn_implementation).to(device)  # noqa: SLF001
    difference = packing_difference(twin, device)
    if not difference < TOLERANCE:
        raise TrainingError(
            f"{model.config.model_type} with attention "
            f"{model.config._attn_implementation!r} mixes packed documents: their logits differ "  # noqa: SLF001
            f"by {difference:.2g} from each document alone (below {TOLERANCE} expected); "
            "use model.attn_implementation: sdpa"
        )


def build_twin(config: Any, attn_implementation: str) -> Any:
    """Return a two-layer float32 model of a config's architecture, in eval mode."""
    small = copy.deepcopy(config)
    for name, value in SIZES.items():
        if hasattr(small, name):
            setattr(small, name, value)
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, attn_implementation=attn_implementation
        )
        for parameter in twin.parameters():  # the usual 0.02 hides attention behind rounding
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return twin.eval()


def packing_difference(model: Any, device: torch.device | str) -> float:
    """Return the largest logit difference between documents packed and each of them alone.

    The batch has two rows of unequal length, so that padding and more than one row are covered.
    """
    sizes = ((5, 9, 3), (7, 4))
    generator = torch.Generator().manual_seed(0)
    documents = [
        [torch.randint(0, 64, (size,), generator=generator).numpy() for size in row]
        for row in sizes
    ]
    worst = 0.0
    with torch.no_grad():
        packed = model(**_inputs(documents, device)).logits
        for row, row_documents in enumerate(documents):
            start = 0
            for document in row_documents:
                alone = model(**_inputs([[document]], device)).logits[0]
                there = packed[row, start : start + len(document)]
                worst = max(worst, float((there - alone).abs().max()))
                start += len(document)
    return worst


def _inputs(documents: list[list[Any]], device: torch.device | str) -> dict[str, Any]:
    """Collate documents as training does, and call the model as training does."""
    rows = []
    for row in documents:
        ids = np.concatenate(row)
        lengths = np.array([len(document) for document in row])
        rows.append(PackedRow(ids, np.full(len(ids), IGNORE_INDEX), lengths))
    batch = Collator(pad_id=0)(rows)
    return {
        "input_ids": batch["input_ids"].to(device),
        "position_ids": batch["position_ids"].to(device),
        "use_cache": False,
    }
