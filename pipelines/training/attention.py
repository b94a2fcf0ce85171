"""Packed documents must not attend to each other: which attention is used, and the proof.

transformers builds a block-diagonal mask from restarting position_ids only without an
attention_mask and without a cache, and not for every architecture and attention implementation;
where it does not, training goes on silently with mixed documents. So it is measured, on a small
twin of the model and in every shape a batch can have.
"""

import copy
import itertools
import logging
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pipelines.errors import TrainingError
from pipelines.training import varlen
from pipelines.training.architectures import DROPOUTS
from pipelines.training.collate import IGNORE_INDEX, Collator, PackedRow

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # float32 noise is about 1e-6, mixed documents differ by more than 0.1
HALF_TOLERANCE = 1e-2  # of what should be equal to the bit, in bfloat16
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "n_inner": 128, "vocab_size": 64, "n_positions": 64,
}  # fmt: skip
# Lengths of the documents of the rows of a batch: one row, equal rows, rows that need padding.
SHAPES = (((5, 9, 3),), ((4, 6), (7, 3)), ((5, 9, 3), (7, 4)))


def use_attention(model: Any, wanted: str) -> None:
    """Switch a model, in an adapter or not, to model.attn_implementation as `wanted`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(choose_attention(wanted, base.config))


def choose_attention(wanted: str, config: Any) -> str:
    """Return the attn_implementation for a model's config, registered with transformers.

    `auto` is the first of varlen, sdpa and eager that keeps packed documents apart here. Raises
    TrainingError where an attention with dropout was asked of varlen, or no attention is safe.
    """
    name = varlen.register()
    attention_dropout = getattr(config, "attn_pdrop", getattr(config, "attention_dropout", 0.0))
    if wanted == "varlen" and attention_dropout:
        raise TrainingError(
            f"model.attn_implementation: varlen has no dropout, and this model's config has "
            f"{attention_dropout} for attention; set model.dropout: 0.0, or use sdpa"
        )
    if wanted != "auto":
        return name if wanted == "varlen" else wanted
    found = ""
    for candidate in ([] if attention_dropout else [name]) + ["sdpa", "eager"]:
        try:
            check_attention(config, candidate, "cpu")
        except Exception as error:  # noqa: BLE001 - an architecture may refuse in any way
            found = f"{found}; {candidate}: {error}"
        else:
            logger.info("attention: %s%s", candidate, found)
            return candidate
    raise TrainingError(f"no attention keeps packed documents of this model apart{found}")


def check_packing(model: Any, device: torch.device | str) -> None:
    """Raise TrainingError unless this kind of model keeps packed documents apart on a device."""
    check_attention(model.config, model.config._attn_implementation, device)  # noqa: SLF001


def check_attention(config: Any, attn_implementation: str, device: torch.device | str) -> None:
    """Raise TrainingError unless a model of this config keeps packed documents apart on a device.

    The check runs a small twin with random weights, in float32 (logits packed = alone) and on
    CUDA also in bfloat16 (the logits of a document do not depend on its neighbours), because the
    fast kernels compute in nothing else.
    """
    twin = build_twin(config, attn_implementation).to(device)
    difference = packing_difference(twin, device)
    tolerance = TOLERANCE
    if difference < tolerance and torch.device(device).type == "cuda":
        twin, tolerance = twin.to(torch.bfloat16), HALF_TOLERANCE
        difference = leak(twin, device)
    if not difference < tolerance:
        raise TrainingError(
            f"{config.model_type} with attention {attn_implementation!r} mixes packed documents: "
            f"their logits differ by {difference:.2g} from each document alone (below {tolerance} "
            "expected); use model.attn_implementation: auto"
        )


def is_flat(model: Any) -> bool:
    """Return whether a model's attention needs flat batches (see Collator)."""
    return bool(model.config._attn_implementation == varlen.NAME)  # noqa: SLF001


def build_twin(config: Any, attn_implementation: str) -> Any:
    """Return a two-layer float32 model of a config's architecture, in eval mode."""
    small = copy.deepcopy(config)
    for name, value in SIZES.items():
        if hasattr(small, name):
            setattr(small, name, value)
    for name in DROPOUTS:
        if hasattr(small, name):
            setattr(small, name, 0.0)
    if getattr(small, "layer_types", None):  # one for each layer, of which there may be fewer
        small.layer_types = (list(small.layer_types) * 2)[: SIZES["num_hidden_layers"]]
    small.bos_token_id = small.eos_token_id = small.pad_token_id = None
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, attn_implementation=attn_implementation
            )
            for parameter in twin.parameters():  # the usual 0.02 hides attention behind rounding
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
    finally:
        transformers_logging.set_verbosity(verbosity)
    return twin.eval()


def packing_difference(model: Any, device: torch.device | str) -> float:
    """Return the largest logit difference between documents packed and each of them alone.

    Batches of one row, of several and of padded ones are tried.
    """
    worst = 0.0
    for shape in SHAPES:
        documents = _documents(shape)
        packed = _logits(model, documents, device)
        for together, document in zip(packed, itertools.chain(*documents), strict=True):
            alone = _logits(model, [[document]], device)[0]
            worst = max(worst, float((together - alone).abs().max()))
    return worst


def leak(model: Any, device: torch.device | str) -> float:
    """Return how far the logits of documents depend on the tokens of the others in their row."""
    worst = 0.0
    for shape in SHAPES:
        documents = _documents(shape)
        before = _logits(model, documents, device)
        for row, row_documents in enumerate(documents):
            for place in range(len(row_documents)):
                changed = [list(documents) for documents in documents]
                changed[row][place] = (changed[row][place] + 1) % SIZES["vocab_size"]
                after = _logits(model, changed, device)
                untouched = sum(len(d) for d in documents[:row]) + place
                pairs = [p for i, p in enumerate(zip(before, after, strict=True)) if i != untouched]
                worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
    return worst


def _documents(shape: tuple[tuple[int, ...], ...]) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            torch.randint(0, SIZES["vocab_size"], (size,), generator=generator).numpy()
            for size in row
        ]
        for row in shape
    ]


def _logits(model: Any, documents: list[list[Any]], device: torch.device | str) -> list[Any]:
    """Collate documents and call the model as training does; return the logits of each."""
    rows = []
    for row in documents:
        ids = np.concatenate(row)
        lengths = np.array([len(document) for document in row])
        rows.append(PackedRow(ids, np.full(len(ids), IGNORE_INDEX), lengths))
    batch = Collator(pad_id=0, flat=is_flat(model))(rows)
    del batch["labels"]
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    if is_flat(model):
        return list(logits[0].split([len(document) for row in documents for document in row]))
    return [
        logits[number, end - len(document) : end]
        for number, (row, packed) in enumerate(zip(documents, rows, strict=True))
        for document, end in zip(row, np.cumsum(packed.lengths), strict=True)
    ]
