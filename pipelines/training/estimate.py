"""How much memory one training process takes, before anything is loaded.

What is held throughout (weights, optimizer state) is added to what five moments hold besides: the
loss at the head, the backward pass of the last and the first block, the optimizer's step, an
evaluation. The largest counts. benchmarks/training_memory.py holds the estimates against measured
peaks.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from pipelines.recipe import Recipe
from pipelines.settings.hardware import Hardware
from pipelines.training.activations import (
    CHUNK_HEAD_BYTES,
    DENSE_HEAD_BYTES,
    Numbers,
    block_bytes,
    chunk_size,
    kept_bytes,
)
from pipelines.training.environment import keeps_memory
from pipelines.training.shapes import Shape

GIB = 2**30
ADAM_BYTES = 8  # two moments in float32
# DeepSpeed's defaults, in elements: what it gathers ahead and keeps, what it reduces at once.
LIVE_PARAMETERS, PREFETCHED, REDUCED = 10**9, 5 * 10**7, 5 * 10**8
# Imports and libraries on CPU, by measurement; CUDA's context, kernels and workspaces, and NCCL's
# buffers, from experience: there was no GPU to measure them on. What tensors take on CUDA was held
# against torch's allocator over a driver that computes nothing: -7 to +14 % in 30 cases.
CPU_FRAMEWORK = 0.52
CPU_DEEPSPEED = 0.07
CUDA_FRAMEWORK, NCCL_BUFFERS = 1.2, 0.8
# What glibc keeps (environment.KEEP_MEMORY) is in pieces that the next tensor may not fit; where it
# returns large tensors to the kernel (RETURN_MEMORY) there are none.
CPU_FRAGMENTS = 0.18
CUDA_FRAGMENTS = 0.05  # of what is allocated and freed in a step


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one process at the moment of its peak, which `moment` names.

    On a GPU they are the GPU's; `host` is what the process takes of the machine's memory.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    framework: float
    host: float = 0.0
    moment: str = ""

    @property
    def total(self) -> float:
        """Return all bytes on the device."""
        parts = (f.name for f in fields(self) if f.name not in ("host", "moment"))
        return float(sum(getattr(self, name) for name in parts))


@dataclass(frozen=True, slots=True)
class _Job:
    """A recipe on a hardware, with the counts that all moments need."""

    recipe: Recipe
    shape: Shape
    hardware: Hardware

    @property
    def zero(self) -> bool:
        return self.hardware.strategy.startswith("zero")

    @property
    def shards(self) -> int:
        return self.hardware.num_nodes * self.hardware.processes_per_node

    @property
    def strategy(self) -> str:
        return self.hardware.strategy

    @property
    def offload(self) -> str:
        return str(getattr(self.hardware, "offload", "none"))

    @property
    def half(self) -> bool:
        return self.recipe.model.dtype == "bfloat16"

    @property
    def trained(self) -> int:
        adapter = self.recipe.adapter
        return self.shape.adapter_parameters(adapter) if adapter else self.shape.parameters

    @property
    def numbers(self) -> Numbers:
        job: dict[str, Any] = {
            "on_cuda": self.hardware.device == "cuda", "dropout": self.dropout, "bits": self.bits
        }  # fmt: skip
        if not self.half:
            return Numbers(4, 4, autocast=False, **job)
        if self.zero:
            return Numbers(2, 2, autocast=False, **job)
        # Of a quantized base norms and embeddings are float32, so that is what its layers return.
        narrow = (self.narrow_base and not self.bits) or self.strategy == "fsdp2"
        return Numbers(2, 2 if narrow else 4, autocast=True, **job)

    @property
    def narrow_base(self) -> bool:
        # Frozen weights are loaded in model.dtype, random and trained ones are float32.
        return self.half and self.recipe.adapter is not None and self.recipe.model.config is None

    @property
    def bits(self) -> int:
        """The width of a quantized base; 0 where it is not."""
        quantized = self.recipe.model.quantization_config
        return 0 if quantized is None else 4 if quantized.load_in_4bit else 8

    @property
    def dropout(self) -> bool:
        rate = self.recipe.model.dropout
        # StarCoder's configs carry 0.1, those of the other families 0.
        return self.shape.model_type == "gpt_bigcode" if rate is None else rate > 0

    @property
    def attention(self) -> str:
        name = self.recipe.model.attn_implementation
        if name == "auto":
            return "sdpa" if self.dropout else "varlen"
        return str(name)

    @property
    def chunked(self) -> bool:
        return getattr(self.recipe.model, "head_loss", "dense") != "dense"

    @property
    def tokens(self) -> int:
        training = self.recipe.training
        return training.per_device_train_batch_size * self.recipe.tokenization.block_size


def estimate_memory(recipe: Recipe, shape: Shape, hardware: Hardware) -> Memory:
    """Return what one process of a run needs at its peak."""
    job = _Job(recipe, shape, hardware)
    moments = [_at_head, _in_last_block, _in_first_block, _at_step, _in_evaluation]
    if job.bits and hardware.device == "cpu":
        moments += [_in_loading, _in_merging]
    return max((moment(job) for moment in moments), key=lambda memory: memory.total)


def _moment(job: _Job, moment: str, *, gradients: float = 0.0, activations: float = 0.0,
            logits: float = 0.0, buffers: float = 0.0) -> Memory:  # fmt: skip
    """Add what a moment holds to what is held throughout."""
    on_cuda = job.hardware.device == "cuda"
    framework = _framework(job)
    buffers += _buffers(job)
    weights, optimizer = _weights(job), _optimizer(job)
    if on_cuda:
        framework += CUDA_FRAGMENTS * (activations + logits + buffers)
    elif keeps_memory(job.recipe, job.hardware):
        held = weights + optimizer + gradients + activations + logits + buffers
        buffers += CPU_FRAGMENTS * held
    return Memory(weights, gradients, optimizer, activations, logits, buffers, framework,
                  _host(job) if on_cuda else 0.0, moment)  # fmt: skip


def _weights(job: _Job) -> float:
    """Return the bytes of the weights as they are kept between steps."""
    n = job.shape.parameters
    adapters = job.trained if job.recipe.adapter else 0
    if job.bits:
        return _quantized(job) + (2 if job.half and job.zero else 4) * adapters
    if job.offload == "all":
        return 0.0
    shards = job.shards if job.strategy in ("zero3", "fsdp2") else 1
    width = 2 if job.narrow_base or (job.half and job.zero) else 4
    return (width * n + (2 if job.half and job.zero else 4) * adapters) / shards


def _quantized(job: _Job) -> float:
    """Return a 4 or 8 bit base: its blocks' matrices shrink, all else is kept in float32.

    DeepSpeed keeps that in bfloat16 where it trains in it.
    """
    settings, shape = job.recipe.model.quantization_config, job.shape
    assert settings is not None
    matrices = shape.layers * shape.block_matrices
    # A scale for 64 numbers: in float32, or in 8 bit with another scale for 256 of those.
    scales = (1 / 64 + 4 / (64 * 256)) if settings.bnb_4bit_use_double_quant else 4 / 64
    width = 0.5 + scales if job.bits == 4 else 1.0
    rest = 2 if job.half and job.zero else 4
    return width * matrices + rest * (shape.parameters - matrices)


def _whole(job: _Job) -> float:
    """Return a base's weights in model.dtype, as they are on disk."""
    return float((2 if job.half else 4) * job.shape.parameters)


def _in_loading(job: _Job) -> Memory:
    """Map the file of a base beside its quantized weights. Needs no optimizer yet."""
    memory = _moment(job, "loading the base", buffers=_whole(job))
    return replace(memory, optimizer=0.0)


def _in_merging(job: _Job) -> Memory:
    """Make the whole weights of a quantized base, whose layers go one by one."""
    embeddings = 4.0 * job.shape.embeddings if job.half else 0.0
    memory = _moment(job, "merging the adapter", buffers=4.0 * job.trained + embeddings)
    return replace(memory, weights=_whole(job) + 4 * job.trained)


def _optimizer(job: _Job) -> float:
    """Return Adam's moments, and the float32 weights that DeepSpeed keeps beside those it uses."""
    if job.offload != "none" and job.hardware.device == "cuda":
        return 0.0
    shards = 1 if job.strategy == "ddp" else job.shards
    return (ADAM_BYTES + (4 if job.zero else 0)) * job.trained / shards


def _gradients(job: _Job) -> float:
    """Return the gradients that outlive a backward pass."""
    if job.strategy == "ddp":
        return 4.0 * job.trained
    if job.offload != "none" and job.hardware.device == "cuda":
        return 0.0
    width = 2 if job.half and job.zero else 4
    return width * job.trained / job.shards


def _buffers(job: _Job) -> float:
    """Return what a strategy communicates through, held throughout."""
    n, strategy, width = job.trained, job.strategy, job.numbers.compute
    if strategy == "ddp":
        return 0.0 if job.hardware.is_alone else 4.0 * n  # DDP's buckets
    on_cuda = job.hardware.device == "cuda"
    if strategy == "fsdp2":
        block = job.shape.block_matrices + job.shape.block_vectors
        live = (3 * block + job.shape.embeddings) * width
        return live + 4.0 * (block + job.shape.embeddings) * (job.recipe.adapter is None)
    # ZeRO-2 fills one bucket while it sends the other; on CPU untouched pages are none.
    full = REDUCED * (2 if strategy == "zero2" else 1)
    reduced = full if on_cuda else min(n, REDUCED)
    live = 0
    if strategy == "zero3":
        live = min(job.shape.parameters, LIVE_PARAMETERS) + PREFETCHED * on_cuda
    return float(width * (reduced + live))


def _framework(job: _Job) -> float:
    if job.hardware.device == "cpu":
        return (CPU_FRAMEWORK + (CPU_DEEPSPEED if job.zero else 0)) * GIB
    return (CUDA_FRAMEWORK + (NCCL_BUFFERS if job.shards > 1 else 0)) * GIB


def _host(job: _Job) -> float:
    """Return the machine's memory of one process: it loads the whole model before it shards."""
    width = 4 if job.recipe.adapter is None or not job.half else 2
    loaded = float(width * job.shape.parameters)
    if job.bits:  # the first process makes whole weights of it at the end
        loaded /= job.hardware.processes_per_node
    offloaded = 0.0
    if job.offload != "none":
        offloaded = (ADAM_BYTES + 4 + 4) * job.trained / job.shards
    if job.offload == "all":
        offloaded += 2 * job.shape.parameters / job.shards
    return max(loaded, offloaded) + (CPU_FRAMEWORK + 1) * GIB


def _saved(job: _Job) -> tuple[float, float]:
    """Return the bytes saved by all blocks, and by the one that is recomputed."""
    recipe, shape, numbers = job.recipe, job.shape, job.numbers
    row = recipe.tokenization.block_size
    block = job.tokens * block_bytes(shape, numbers, row, job.attention, recipe.adapter)
    stream = job.tokens * shape.hidden * numbers.stream
    ends = 2 * stream + job.tokens * 40  # around the blocks; ids, labels and positions
    if recipe.training.gradient_checkpointing:
        kept = job.tokens * kept_bytes(shape, numbers)
        return shape.layers * (stream + kept) + ends, block
    return shape.layers * block + ends, 0.0


def _casts(job: _Job) -> float:
    """Return autocast's copies of float32 weights, kept until the forward pass ends."""
    if not job.numbers.autocast or job.narrow_base or job.strategy == "fsdp2":
        return 0.0
    matrices = job.shape.layers * job.shape.block_matrices
    return 2.0 * (matrices + job.shape.vocab * job.shape.hidden)


def _accumulated(job: _Job) -> float:
    """Return the gradients of the batches before, which the next one is added to."""
    accumulates = job.recipe.training.gradient_accumulation_steps > 1
    return _gradients(job) if accumulates or job.zero else 0.0


def _at_head(job: _Job) -> Memory:
    saved, _ = _saved(job)
    return _moment(
        job,
        "loss",
        gradients=_accumulated(job),
        activations=saved + _casts(job),
        logits=_logits(job, job.tokens, trained=True),
    )


def _logits(job: _Job, tokens: int, *, trained: bool) -> float:
    """Return what the head's loss holds: all logits, or those of a chunk and the gradients so far.

    The head's gradient is summed in float32 and copied once when it is scaled.
    """
    shape, size = job.shape, job.numbers.compute
    if not job.chunked:
        return float(DENSE_HEAD_BYTES * shape.vocab * tokens)
    head = shape.vocab * shape.hidden
    total = CHUNK_HEAD_BYTES * shape.vocab * chunk_size(tokens) + 2 * tokens * shape.hidden * size
    if job.numbers.autocast and (job.recipe.adapter is None or job.bits):
        total += 2 * head  # cast from float32
    if trained and job.recipe.adapter is None:
        total += 8 * head
    return float(total)


def _in_last_block(job: _Job) -> Memory:
    """Take the last block, which goes first: all others are saved, the head has its gradient."""
    saved, recomputed = _saved(job)
    shape = job.shape
    head = 0.0 if job.recipe.adapter else 4.0 * shape.vocab * shape.hidden
    before = _accumulated(job)
    gradients = max(before, head) if job.strategy == "ddp" else before + head
    if job.recipe.training.gradient_checkpointing:
        casts = 2.0 * shape.block_matrices if _casts(job) else 0.0
    else:
        casts = _casts(job)
    activations = saved + recomputed + _working(job) + casts
    return _moment(job, "backward pass", gradients=gradients, activations=activations)


def _in_first_block(job: _Job) -> Memory:
    """Take the first block, which goes last: nothing else is saved, all gradients are there."""
    saved, recomputed = _saved(job)
    block = recomputed or saved / job.shape.layers
    activations = block + _working(job)
    return _moment(job, "backward pass", gradients=_gradients(job), activations=activations)


def _working(job: _Job) -> float:
    """Return what the backward pass of one block holds besides what was saved."""
    shape, numbers = job.shape, job.numbers
    width = 2 * shape.inner * numbers.compute + 4 * shape.hidden * numbers.stream
    working = float(job.tokens * width)
    if job.bits:  # each layer's whole weights, in turn
        working += numbers.compute * max(a * b for a, b in shape.linear_layers.values())
    return working


def _at_step(job: _Job) -> Memory:
    """Add what Adam's step takes: nothing where it is fused (CUDA), else a tensor's temporaries.

    DeepSpeed steps on a float32 copy of its shard of the gradients.
    """
    temporary = 0.0
    if job.zero and (job.offload == "none" or job.hardware.device == "cpu"):
        temporary = 4.0 * job.trained / job.shards
    if job.hardware.device == "cpu" and job.recipe.adapter is None:
        temporary += 8.0 * job.shape.vocab * job.shape.hidden
    return _moment(job, "optimizer's step", gradients=_gradients(job), buffers=temporary)


def _in_evaluation(job: _Job) -> Memory:
    """Add up the logits of the evaluated rows, those of trained tokens, their log-softmax."""
    batch = job.recipe.training.per_device_eval_batch_size
    tokens = batch * job.recipe.tokenization.block_size
    working = tokens * (2 * job.shape.inner + 6 * job.shape.hidden) * job.numbers.compute
    logits = _logits(job, tokens, trained=False)
    return _moment(job, "evaluation", activations=working, logits=logits)
