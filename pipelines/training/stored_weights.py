"""The weights of a checkpoint, back into a model that is whole and not sharded."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipelines.errors import StoreError
from pipelines.training.adapters import has_adapter

ADAPTER, WEIGHTS, INDEX = (  # transformers' and PEFT's names
    "adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json"
)  # fmt: skip


def load_checkpoint(model: Any, folder: Path) -> None:
    """Set a model's weights, or those of its adapter, to a checkpoint's.

    Raises StoreError where the checkpoint lacks some of them.
    """
    if has_adapter(model):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(model, load_file(folder / ADAPTER))
        _check(folder, list(result.unexpected_keys))
        return
    own = model.state_dict()
    # Tied weights are one storage under two names, of which a checkpoint may have either.
    missing = {tensor.data_ptr(): name for name, tensor in own.items()}
    for name in _files(folder):
        loaded = load_file(folder / name)
        _check(folder, sorted(loaded.keys() - own.keys()))
        model.load_state_dict(loaded, strict=False)
        for key in loaded:
            missing.pop(own[key].data_ptr(), None)
    _check(folder, sorted(missing.values()))


def _files(folder: Path) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [WEIGHTS]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _check(folder: Path, wrong: list[str]) -> None:
    if wrong:
        raise StoreError(
            f"{folder}: its weights are not those of this model ({', '.join(wrong[:3])}); "
            "train it again with --force"
        )
