"""torch.compile of each block of a model (`training.torch_compile`), for speed on NVIDIA GPUs.

Blocks are compiled in place, each by itself: they share one compilation, which takes a minute
where that of a whole model takes many, and every name in the state dict stays. Batches are all of
one shape, so that nothing is compiled anew; evaluations, whose shapes differ, run uncompiled.
"""

import contextlib
from typing import Any

from pipelines.errors import TrainingError
from pipelines.recipe import Recipe
from pipelines.training.attention import is_flat
from pipelines.training.collate import FlatShape, PassedDataset
from pipelines.training.fsdp import block_classes
from pipelines.training.varlen import cuda_kernel

BACKEND = "inductor"
KEY = "training.torch_compile"


def compile_training(model: Any, recipe: Recipe, rows: PassedDataset) -> FlatShape | None:
    """Compile a model's blocks where the recipe asks for it; return the shape of its batches.

    None where it does not. Raises TrainingError where the model, as it is here, cannot be compiled.
    """
    if not recipe.training.torch_compile:
        return None
    compile_blocks(model)
    training, block = recipe.training, recipe.tokenization.block_size
    count = training.per_device_train_batch_size
    # Each row may need one document of pad tokens to be full.
    return FlatShape(count * block, count * (rows.most_documents + 1), block)


def compile_blocks(model: Any) -> None:
    """Compile each block in place, for one shape of batches. They are compiled at first use."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not is_flat(base):
        raise TrainingError(
            f"{KEY}: attention {base.config._attn_implementation!r} has a mask of another shape in "  # noqa: SLF001
            "every batch; set model.dropout: 0.0 and model.attn_implementation: varlen, or "
            f"{KEY}: false"
        )
    if torch.cuda.is_available() and cuda_kernel() is None:
        raise TrainingError(
            f"{KEY}: this torch or GPU has no kernel for varlen attention (NVIDIA, compute "
            f"capability 8.0 or above, is needed); set {KEY}: false"
        )
    # The graphs are blocks, so DDP can send gradients block by block: smaller ones gain nothing.
    torch._dynamo.config.optimize_ddp = False  # noqa: SLF001
    names = block_classes(base, asked=KEY, instead=f"set {KEY}: false")
    for module in base.modules():
        if type(module).__name__ in names:
            module.compile(backend=BACKEND, dynamic=False)


def uncompiled(*, compiled: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which compiled blocks run as they are written."""
    if not compiled:
        return contextlib.nullcontext()
    import torch

    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
