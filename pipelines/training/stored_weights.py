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
SHARDED = "pytorch_model_fsdp_0"  # a folder: accelerate's name


def load_checkpoint(model: Any, folder: Path) -> None:
    """Set a model's weights, or those of its adapter, to a checkpoint's.

    Raises StoreError where the checkpoint lacks some of them.
    """
    sharded = folder / SHARDED
    if has_adapter(model):
        from peft import set_peft_model_state_dict

        adapter = read_sharded(sharded) if sharded.is_dir() else load_file(folder / ADAPTER)
        result = set_peft_model_state_dict(model, adapter)
        _check(folder, list(result.unexpected_keys))
        return
    own = model.state_dict()
    # Tied weights are one storage under two names, of which a checkpoint may have either.
    missing = {tensor.data_ptr(): name for name, tensor in own.items()}
    for name in [SHARDED] if sharded.is_dir() else _files(folder):
        loaded = read_sharded(sharded) if name == SHARDED else load_file(folder / name)
        _check(folder, sorted(loaded.keys() - own.keys()))
        model.load_state_dict(loaded, strict=False)
        for key in loaded:
            missing.pop(own[key].data_ptr(), None)
    _check(folder, sorted(missing.values()))


def read_sharded(folder: Path) -> dict[str, Any]:
    """Return the whole weights of a sharded checkpoint (FSDP2's), in this process alone."""
    from torch import empty
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    weights: dict[str, Any] = {
        name: empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


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
