"""What a DeepSpeed JSON says, beside a recipe: DeepSpeed's word wins in silence, so it is told."""

from typing import Any, Protocol

from pipelines.hardware_files import hardware_names
from pipelines.recipe import load_hardware

STRATEGIES = {0: "ddp", 1: "zero2", 2: "zero2", 3: "zero3"}
EFFECTIVE = {
    "WarmupLR": ("a warm-up, then a constant learning rate", "constant_with_warmup"),
    "WarmupDecayLR": ("a warm-up, then a linear decay", "linear"),
    "WarmupCosineLR": ("a warm-up, then a cosine", "cosine"),
}
# DeepSpeed's keys that mean the same as one of the recipe.
SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
OPTIMIZER = {"lr": "learning_rate", "weight_decay": "weight_decay"}
READ = {*SAME, "train_batch_size", "zero_optimization", "scheduler", "optimizer", "bf16", "fp16"}


class Report(Protocol):
    """What is imported so far."""

    values: dict[str, Any]

    def say(self, kind: str, key: str, text: str) -> None:
        """Add a line to the report."""


def import_deepspeed(work: Report, config: dict[str, Any], name: str) -> str:
    """Compare DeepSpeed's keys with the recipe's, report what differs, and return the strategy."""
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    strategy = STRATEGIES.get(stage, "zero3") if isinstance(stage, int) else "zero3"
    _compare_scheduler(work, config)
    _compare_optimizer(work, config)
    training = {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0, **work.values["training"]}
    for theirs, ours in SAME.items():
        _compare(work, f"deepspeed.{theirs}", config.get(theirs, "auto"), ours, training[ours])
    _compare_total(work, config.get("train_batch_size", "auto"), training)
    if _section(config, "fp16").get("enabled") is True:
        work.say("conflict", "deepspeed.fp16", "float16 is not supported; model.dtype decides")
    if _section(config, "bf16").get("enabled") is True and _dtype(work) != "bfloat16":
        work.say("conflict", "deepspeed.bf16", f"enabled, but model.dtype is {_dtype(work)}")
    offload = [key for key in ("offload_optimizer", "offload_param") if _offloads(zero, key)]
    for key in offload:
        text = "choose a hardware file with offload, where memory is short"
        work.say("note", f"deepspeed.zero_optimization.{key}", text)
    tuned = [f"zero_optimization.{key}" for key in zero if key != "stage" and key not in offload]
    rest = ", ".join([*tuned, *(key for key in config if key not in READ)])
    if rest:
        work.say("ignored", f"{name}", f"generated from the recipe instead: {rest}")
    if stage == 1:
        work.say("conflict", "deepspeed.zero_optimization.stage", "1 becomes 2 (zero2)")
    return f"{strategy}-offload" if offload else strategy


def pick_hardware(work: Report, strategy: str) -> str:
    """Return the hardware file for GPUs that comes closest to a strategy."""
    wanted, _, offload = strategy.partition("-")
    files = {name: load_hardware(name) for name in hardware_names()}
    fitting = [
        name
        for name, hardware in files.items()
        if hardware.device == "cuda" and hardware.strategy == wanted
    ]
    if wanted == "ddp" and "gpu" in fitting:
        return "gpu"
    exact = [name for name in fitting if name in (strategy, wanted)]
    found = sorted(exact, key=lambda name: name != strategy) or fitting
    chosen = found[0] if found else "zero3"
    if not found or (offload and "offload" not in chosen):
        work.say("conflict", "hardware", f"there is none for {strategy}; {chosen} is taken")
    else:
        work.say("note", "hardware", f"{chosen}: check its number of processes")
    return chosen


def _compare_scheduler(work: Report, config: dict[str, Any]) -> None:
    """Say what the learning rate really did: DeepSpeed's scheduler overrides the script's."""
    scheduler = _section(config, "scheduler")
    if not scheduler:
        return
    kind = str(scheduler.get("type"))
    ours = work.values["training"]["lr_scheduler_type"]
    did, same = EFFECTIVE.get(kind, ("a schedule of its own", ""))
    if same == ours:
        work.say("ignored", "deepspeed.scheduler", f"{kind} is what lr_scheduler_type {ours} does")
        return
    repeat = f"; to repeat it set training.lr_scheduler_type: {same}" if same else ""
    work.say(
        "conflict",
        "deepspeed.scheduler",
        f"{kind} overrode lr_scheduler_type {ours} in the original: it had {did}. "
        f"The recipe follows {ours}{repeat}",
    )


def _compare_optimizer(work: Report, config: dict[str, Any]) -> None:
    optimizer = _section(config, "optimizer")
    if not optimizer:
        return
    kind = str(optimizer.get("type"))
    if kind not in ("Adam", "AdamW"):
        work.say("conflict", "deepspeed.optimizer", f"{kind} is not used; AdamW is")
    training = {"weight_decay": 0.0, **work.values["training"]}
    params = _section(optimizer, "params")
    for theirs, ours in OPTIMIZER.items():
        key = f"deepspeed.optimizer.params.{theirs}"
        _compare(work, key, params.get(theirs, "auto"), ours, training[ours])


def _compare(work: Report, key: str, theirs: Any, name: str, ours: Any) -> None:
    if theirs not in ("auto", ours):
        text = f"{theirs} contradicts training.{name}: {ours}; the recipe follows {ours}"
        work.say("conflict", key, text)


def _compare_total(work: Report, total: Any, training: dict[str, Any]) -> None:
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    if total == "auto" or not isinstance(total, int):
        return
    if total % rows:
        text = f"{total} is no multiple of the {rows} rows that each process has in a step"
    else:
        text = f"{total} rows a step are right for {total // rows} process(es) only"
    work.say("conflict", "deepspeed.train_batch_size", f"{text}; it follows from the hardware")


def _offloads(zero: dict[str, Any], key: str) -> bool:
    return bool(_section(zero, key).get("device", "none") != "none")


def _dtype(work: Report) -> str:
    return str(work.values["model"]["dtype"])


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}
