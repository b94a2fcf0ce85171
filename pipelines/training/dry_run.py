"""What `starloom run RECIPE --dry-run` prints: a shell script of what would be executed.

Nothing runs, and neither data nor GPUs are needed. The paths of a run that was opened before are
filled in; they follow from the data, so otherwise the script sets them with `--prepare-only`.
"""

import json
import os
import shlex
from pathlib import Path

from pipelines.errors import TrainingError
from pipelines.fingerprint import code_digest
from pipelines.recipe import Recipe, load_hardware
from pipelines.runs import TRAINER, Run
from pipelines.settings.hardware import Hardware
from pipelines.store import Store
from pipelines.training.base_model import find_shape
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.environment import child_environment
from pipelines.training.fsdp import BLOCKS, fsdp_config
from pipelines.training.hardware_checks import launch_problems
from pipelines.training.launchers import (
    EndpointError,
    Node,
    Target,
    endpoint_of,
    find_node,
    launch_command,
    node_environment,
    slurm_script,
    spans_nodes,
    target_of,
)
from pipelines.training.nodes import ATTEMPT, rdzv_id

UNKNOWN = Target("$RUN", "$DATASET", "$TOKENIZER")
ADDRESS = "$NODE_ADDRESS"


def describe(recipe: Recipe, arguments: list[str], root: Path) -> str:
    """Return the script for a recipe; `arguments` are those of `starloom` without --dry-run.

    Raises TrainingError where the hardware cannot be used as it is written.
    """
    hardware = load_hardware(recipe.hardware)
    check_hardware(recipe, hardware, dry=True)
    run = find_opened(recipe, root / "runs")
    parts = [_head(recipe, hardware, arguments)]
    if hardware.launcher == "slurm":
        script = slurm_script(hardware, recipe.name, arguments, root)
        name = f"{recipe.name}.sbatch"
        parts += [
            "# The job's script. Submitted, it runs the same `starloom run` on every node.",
            f"{_heredoc(f'cat > {name}', script.rstrip())}\nsbatch {name}",
            "# What that starts in the job:",
        ]
    parts += _preparation(run, arguments)
    parts += _commands(recipe, hardware, run, Store(root / "store"))
    return "\n\n".join([*parts, *_configurations(recipe, hardware)]) + "\n"


def check_hardware(recipe: Recipe, hardware: Hardware, *, dry: bool = False) -> None:
    """Raise TrainingError with all that is wrong with a hardware file's settings."""
    problems = launch_problems(recipe, hardware, here=True, dry=dry)
    if problems:
        raise TrainingError("; ".join(problems))


def find_opened(recipe: Recipe, runs: Path) -> Run | None:
    """Return the newest run that was opened for exactly this recipe with this code, if any."""
    code = code_digest(TRAINER)
    found = sorted(runs.glob("*/run.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in found:
        run = Run(path.parent)
        if ".replaced-" in run.name or not run.name.startswith(f"{recipe.name}-"):
            continue
        try:
            if run.info()["key_parts"]["code"] == code and run.recipe() == recipe:
                return run
        except (KeyError, ValueError, OSError):
            continue  # of another version
    return None


def _head(recipe: Recipe, hardware: Hardware, arguments: list[str]) -> str:
    nodes = f"{hardware.num_nodes} node(s) x {hardware.processes_per_node} process(es)"
    lines = [
        f"# {recipe.name} on hardware {recipe.hardware}: {nodes}, {hardware.device}",
        f"# strategy {hardware.strategy}, offload {hardware.offload}, launcher {hardware.launcher}",
        "# `starloom run` does all of the following, and evaluates afterwards:",
        f"#   {shlex.join(['starloom', *arguments])}",
    ]
    if spans_nodes(hardware):
        lines.append("# Start that same command on every node: node 0 leads, the others join it.")
    return "\n".join(lines)


def _preparation(run: Run | None, arguments: list[str]) -> list[str]:
    if run is not None:
        return [f"# The data is prepared (run {run.name})."]
    prepare = shlex.join(["starloom", *arguments, "--prepare-only"])
    title = "# The data (on node 0 only), which the paths of the run follow from:"
    return [f'{title}\neval "$({prepare})"']


def _commands(recipe: Recipe, hardware: Hardware, run: Run | None, store: Store) -> list[str]:
    """Return the commands that start the ranks, for each kind of node."""
    target = target_of(run, store) if run else UNKNOWN
    attempt = rdzv_id(run, _attempts(run) + 1) if run else "$(basename $RUN)-1"
    if not spans_nodes(hardware):
        return [f"# The ranks:\n{_line(recipe, hardware, target, None, attempt)}"]
    here, note = _this_node(hardware)
    host = here.endpoint.rpartition(":")[0]
    address = 'NODE_ADDRESS="$(hostname -I | cut -d" " -f1)"  # its own, as node 0 reaches it\n'
    if here.leader:
        leader, other = here, Node("1", False, ADDRESS, here.endpoint)
    else:
        leader, other = Node("0", True, host, here.endpoint), here
    blocks = []
    for title, node in (("node 0", leader), ("every other node", other)):
        known = address if node.address == ADDRESS else ""
        line = _line(recipe, hardware, target, node, attempt)
        blocks.append(f"# The ranks of {title}:\n{known}{line}")
    return [*note, *blocks]


def _this_node(hardware: Hardware) -> tuple[Node, list[str]]:
    """Return which node this machine is, as node 0 where it does not know it, and a comment."""
    if hardware.launcher == "slurm":
        return Node("$SLURM_NODEID", True, ADDRESS, "$STARLOOM_RDZV_ENDPOINT"), []
    try:
        found = find_node(hardware)
    except EndpointError as error:
        return Node("0", True, ADDRESS, endpoint_of(hardware) or ""), [f"# {error}"]
    assert found is not None
    return found, []


def _attempts(run: Run) -> int:
    return int((run.read(ATTEMPT) or {}).get("number", 0))


def _line(
    recipe: Recipe, hardware: Hardware, target: Target, node: Node | None, attempt: str
) -> str:
    """Return one command, with the variables that are added to the environment before it."""
    ours = child_environment(recipe, hardware, {})
    if node is not None and node.address != ADDRESS:
        ours |= node_environment(node, {})
    settings = [_quote(f"{name}={value}") for name, value in sorted(ours.items())]
    command = [_quote(part) for part in launch_command(hardware, target, node, attempt)]
    return " \\\n  ".join(["env " + " ".join(settings), " ".join(command)])


def _quote(argument: str) -> str:
    """Quote an argument for the shell, letting our own variables through."""
    name, separator, value = argument.partition("=")
    ours = (*vars_of(UNKNOWN), ADDRESS, "$(basename $RUN)", "$STARLOOM_RDZV_ENDPOINT")
    if separator and value.startswith(ours):
        return f'{name}="{value}"'
    return shlex.quote(argument)


def vars_of(target: Target) -> tuple[str, ...]:
    """Return what stands for the paths of a target."""
    return target.run, target.dataset, target.tokenizer


def _configurations(recipe: Recipe, hardware: Hardware) -> list[str]:
    """Return DeepSpeed's or FSDP's configuration, which every rank generates for itself."""
    shown = []
    for name, config in (
        ("DeepSpeed", deepspeed_config(recipe, hardware)),
        ("FSDP (TrainingArguments.fsdp_config)", fsdp_config(recipe, hardware, _blocks(recipe))),
    ):
        if config is not None:
            title = f"# {name}, as every rank generates it from the recipe:"
            shown.append(f"{title}\n{_heredoc(':', json.dumps(config, indent=2))}")
    return shown


def _blocks(recipe: Recipe) -> list[str]:
    """Return the block classes of an architecture that is known here; else they are read later."""
    shape = find_shape(recipe)
    known = BLOCKS.get(shape.model_type) if shape else None
    return [known or "(_no_split_modules of the model)"]


def _heredoc(command: str, text: str) -> str:
    return f"{command} <<'END'\n{text}\nEND"


def prepared(run: Run, store: Store) -> str:
    """Return the shell assignments that `--prepare-only` prints."""
    paths = zip(vars_of(UNKNOWN), vars_of(target_of(run, store)), strict=True)
    return "\n".join(f"{name[1:]}={shlex.quote(os.fspath(path))}" for name, path in paths)
