"""What a recipe needs, on one screen: `starloom doctor RECIPE`."""

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import PreflightError
from pipelines.preflight.checks import GB, Findings, estimate_disk, examine
from pipelines.preflight.dataset import raw_bytes
from pipelines.preflight.fitting import Asked, describe, memory_limit, method, shorten
from pipelines.preflight.source_access import missing_sources
from pipelines.training.duration import (
    Length,
    device_rate,
    estimate_length,
    estimate_seconds,
    tokens_per_step,
)
from pipelines.training.estimate import GIB, estimate_memory
from pipelines.training.schedule import draw_schedule, schedule_problems

BYTES_PER_TOKEN = 4.0  # of code and English, where no sample tells
KEPT = 0.8  # of raw text, after curation and the held-out splits
PACKED_SUFFIXES = {".gz": 4.0, ".zst": 5.0, ".xz": 6.0, ".7z": 6.0, ".bz2": 5.0, ".parquet": 2.5}
TOKENS_PER_ROW = 200  # of a published data set of instructions


def doctor(asked: Asked, root: Path) -> Iterator[str]:
    """Yield the lines of the screen; at its end PreflightError where the recipe cannot run here."""
    recipe = asked.load()
    found = examine(recipe, root, train_here=True, asked=asked)
    length = estimate_length(
        recipe, found.hardware, found.dataset.rows if found.dataset else None, rough_tokens(found)
    )
    yield f"recipe    {recipe.name}: {recipe.description}"
    yield f"model     {_model(found)}"
    yield f"method    {_method(found)}"
    yield f"hardware  {_hardware(found)}"
    yield from _memory(found)
    yield f"disk      about {estimate_disk(recipe) / GB:.1f} GB below {root}"
    yield f"template  {_template(found)}"
    yield f"dataset   {_dataset(found)}"
    yield f"length    {_length(found, length)}"
    yield f"time      {_time(found, length)}"
    if length is not None and length.steps:
        yield "learning rate"
        yield from draw_schedule(recipe, length.steps)
        yield from (f"note      {problem}" for problem in schedule_problems(recipe, length.steps))
    yield from (f"note      {note}" for note in found.notes)
    if not found.problems:
        yield "ready"
        return
    yield ""
    yield f"not ready, {len(found.problems)} to mend:"
    yield from (f"  - {problem}" for problem in found.problems)
    if found.instead:
        yield "instead:"
        for each in found.instead:
            yield f"  {each.what}, {each.memory.total / GIB:.1f} GiB a process, {each.where}:"
            yield f"    {each.asked.command}"
    heads = "; ".join(problem.split("; ")[0].split(": accept")[0] for problem in found.problems)
    raise PreflightError(f"recipe {recipe.name} is not ready here: {heads}")


def rough_tokens(found: Findings) -> int | None:
    """Return a guess at the tokens to train on, from the size of what the sources hold."""
    recipe, sample = found.recipe, found.sample
    density = BYTES_PER_TOKEN
    if sample is not None and sample.tokens and sample.bytes:
        density = sample.bytes / sample.tokens
    caps = [source.max_records for source in recipe.sources]
    if sample is not None and sample.records and all(caps):
        return int(sum(cap or 0 for cap in caps) * sample.tokens / sample.records * KEPT)
    size = raw_bytes(recipe, PACKED_SUFFIXES)
    if size is not None:
        return int(size / density * KEPT)
    rows = [getattr(source, "expected_rows", None) or 0 for source in recipe.sources]
    return int(sum(rows) * TOKENS_PER_ROW * KEPT) if all(rows) else None


def _model(found: Findings) -> str:
    recipe, shape = found.recipe, found.shape
    name = recipe.model.model_name_or_path or "random weights"
    if shape is None:
        return f"{name}: its sizes are not known here, so that memory and time are not estimated"
    return (
        f"{name}, {shape.model_type}, {shorten(shape.parameters)} parameters: "
        f"{shape.layers} layers x {shape.hidden}, {shape.positions:,} positions"
    )


def _method(found: Findings) -> str:
    recipe, shape = found.recipe, found.shape
    text = f"{method(recipe)}, {recipe.model.dtype}"
    if shape is not None and recipe.adapter is not None:
        text += f", {shorten(shape.adapter_parameters(recipe.adapter))} trained parameters"
    checkpointing = recipe.training.gradient_checkpointing
    return text + ", gradient checkpointing" * checkpointing


def _hardware(found: Findings) -> str:
    hardware, machine = found.hardware, found.machine
    ranks = hardware.num_nodes * hardware.processes_per_node
    gpus = f"{machine.gpus} GPUs here"
    if machine.gpu_name and machine.gpu_memory:
        gpus = f"{machine.gpus} x {machine.gpu_name} of {machine.gpu_memory / GIB:.0f} GiB here"
    return (
        f"{found.recipe.hardware}: {ranks} {hardware.device} processes, {hardware.strategy} "
        f"({gpus}, {machine.memory / GIB:.0f} GiB of main memory)"
    )


def _memory(found: Findings) -> Iterator[str]:
    if found.shape is None:
        yield "memory    not estimated"
        return
    memory = estimate_memory(found.recipe, found.shape, found.hardware)
    limit = memory_limit(found.hardware, found.machine)
    device = "process" if found.hardware.device == "cpu" else "GPU"
    usable = "" if limit is None else f" of {limit / GIB:.1f} usable"
    yield (
        f"memory    about {memory.total / GIB:.1f} GiB per {device}{usable}, "
        f"at its peak in the {memory.moment}"
    )
    yield f"          {describe(memory)}"


def _template(found: Findings) -> str:
    recipe, sample = found.recipe, found.sample
    text: str = recipe.template.name
    if sample is None:
        return text
    if sample.control_ids:
        names = list(sample.control_ids)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        text += f"; control tokens {' '.join(names[:8])}{more}"
    if sample.records:
        share = sample.trained_tokens / max(sample.tokens, 1)
        text += f"; of the first {sample.records} records {share:.0%} of the tokens are trained"
    return text


def _dataset(found: Findings) -> str:
    if found.dataset is None:
        missing = [source.id for source in missing_sources(found.recipe)]
        first = f"; a run fetches {', '.join(missing)} first, which takes network access"
        return "not built yet" + first * bool(missing)
    dataset = found.dataset
    share = dataset.trained_tokens / max(dataset.tokens, 1)
    return (
        f"{dataset.rows:,} rows, {dataset.tokens:,} tokens, {share:.0%} trained; shards as in "
        f"their manifest ({dataset.folder})"
    )


def _length(found: Findings, length: Length | None) -> str:
    if length is None:
        return "not known before the data is here (num_train_epochs of an unknown number of rows)"
    about = "roughly " if length.rough else ""
    step = tokens_per_step(found.recipe, found.hardware)
    return f"{about}{length.steps:,} steps of {step:,} tokens, {shorten(length.tokens)} in all"


def _time(found: Findings, length: Length | None) -> str:
    if found.shape is None or length is None:
        return "not estimated"
    recipe, hardware = found.recipe, found.hardware
    rate = device_rate(recipe, hardware, found.machine.gpu_name)
    if rate is None:
        return "not estimated: no FLOP/s is known for the GPU (set peak_tflops in its hardware)"
    seconds = estimate_seconds(recipe, found.shape, hardware, length.tokens, rate)
    text = f"about {_duration(seconds)} of training at {rate / 1e12:.3g} TFLOP/s a process"
    if hardware.price_per_hour:
        text += f", about {seconds / 3600 * hardware.price_per_hour * hardware.num_nodes:.2f}"
        text += f" at {hardware.price_per_hour:g} an hour and node"
    return text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86_400:.0f} days"
