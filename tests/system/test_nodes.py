"""Two nodes train one run: in two network namespaces where that is allowed, else on loopback."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.jsonlines import read_lines
from pipelines.runs import Run
from pipelines.training.checkpoints import newest_checkpoint
from pipelines.training.launch import launch
from tests.assets.training_runs import make_run
from tests.assets.two_nodes import ADDRESSES, two_nodes
from tests.system.test_training import last_step, outcome, recipe, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NODE = """
import logging, sys
from pathlib import Path
from pipelines.runs import Run
from pipelines.store import Store
from pipelines.training.environment import hardware_of
from pipelines.training.join import join
from pipelines.training.launch import launch
from pipelines.training.launchers import find_node

logging.basicConfig(level=logging.INFO)
run, store = Run(Path(sys.argv[1])), Store(Path(sys.argv[2]))
node = find_node(hardware_of(run))
if node.leader:
    print(launch(run, store, poll_seconds=0.05)["status"])
else:
    print(join(run.recipe(), node, store, run.path.parent).read("training.json")["status"])
"""


@pytest.fixture(scope="module")
def nodes():
    with two_nodes() as made:
        yield made


@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    """What two ranks on one node make of the same run."""
    run, store = make_run(tmp_path_factory.mktemp("one"), recipe())
    launch(run, store)
    return run


def make_two(root, **hardware):
    return make_run(root, recipe(), num_nodes=2, processes_per_node=1, **hardware)


def start(nodes, run, store):
    """Start both nodes, the other one first; return their processes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", NODE, run.path, store.root]
    other = nodes.start(1, command, **pipes)
    return [nodes.start(0, command, **pipes), other]


def finish(processes, seconds=300):
    ended = [process.communicate(timeout=seconds) for process in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, ended, strict=True)]


def processes_of(run, node):
    """All supervisors, agents and ranks of a node of a run."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if f"--run={run.path}" in (process.info["cmdline"] or ()):
            try:
                if process.environ().get("STARLOOM_NODE") == node:
                    found.append(process)
            except psutil.Error:
                continue
    return found


def is_of(process, module):
    return process.info["cmdline"][:3] == [sys.executable, "-m", module]


def same_outcome(run, expected):
    """Metrics, result and weights; the files of a checkpoint may have other names."""
    assert outcome(run) == outcome(expected)


def test_two_nodes_train_as_two_ranks_of_one_node_do(nodes, one_node, tmp_path):
    run, store = make_two(tmp_path)

    ended = finish(start(nodes, run, store))

    assert [(code, out) for code, out, _ in ended] == [(0, "finished\n")] * 2, ended
    same_outcome(run, one_node)
    assert run.read("attempt.json")["status"] == "finished"
    if nodes.isolated:
        assert run.read("attempt.json")["nodes"] == [ADDRESSES[1]]
        log = (run.path / "nodes" / f"{ADDRESSES[1]}.log").read_text()
        assert "127.0.0.1" not in log
    assert not processes_of(run, "0")


@pytest.mark.parametrize("module", ["torch.distributed.run", "pipelines.training.supervise"])
def test_a_killed_agent_ends_the_attempt_everywhere_and_the_next_one_resumes(
    nodes, one_node, tmp_path, module
):
    run, store = make_two(tmp_path)
    started = start(nodes, run, store)
    name = ADDRESSES[1] if nodes.isolated else "1"
    wait_until(lambda: last_step(run) >= 8)
    (victim,) = [p for p in processes_of(run, name) if is_of(p, module)]
    victim.kill()

    ended = finish(started)

    assert [(code, out) for code, out, _ in ended] == [(0, "finished\n")] * 2, ended
    assert run.read("attempt.json")["number"] == 2
    same_outcome(run, one_node)


def test_a_node_that_is_killed_as_a_whole_may_come_back(nodes, one_node, tmp_path):
    run, store = make_two(tmp_path)
    leader, other = start(nodes, run, store)
    wait_until(lambda: last_step(run) >= 8)
    other.kill()
    other.communicate()
    wait_until(lambda: run.read("attempt.json")["number"] == 2)
    assert newest_checkpoint(run.checkpoints) is not None
    again = nodes.start(
        1,
        [sys.executable, "-c", NODE, run.path, store.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    ended = finish([leader, again])

    assert [(code, out) for code, out, _ in ended] == [(0, "finished\n")] * 2, ended
    same_outcome(run, one_node)


def test_a_killed_node_0_is_waited_for_and_resumes_with_the_others(nodes, one_node, tmp_path):
    run, store = make_two(tmp_path)
    leader, other = start(nodes, run, store)
    wait_until(lambda: last_step(run) >= 8)
    leader.kill()
    leader.communicate()
    time.sleep(1)
    command = [sys.executable, "-c", NODE, run.path, store.root]
    again = nodes.start(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    ended = finish([again, other])

    assert [(code, out) for code, out, _ in ended] == [(0, "finished\n")] * 2, ended
    same_outcome(run, one_node)


def test_the_same_command_on_both_nodes_runs_a_recipe_to_its_report(nodes, tmp_path):
    hardware = tmp_path / "two.yaml"
    hardware.write_text("device: cpu\nnum_nodes: 2\nstrategy: fsdp2\n")
    command = [
        sys.executable, "-m", "pipelines.cli", "run", "quickstart", "--smoke",
        "--set", f"hardware={hardware}", "--set", "evaluation.min_improvement=0",
    ]  # fmt: skip
    data = {"STARLOOM_DATA": str(tmp_path / "data")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": data}

    ended = finish([nodes.start(number, command, **pipes) for number in (0, 1)])

    assert [code for code, _, _ in ended] == [0, 0], ended
    (path,) = (tmp_path / "data" / "runs").glob("quickstart-*")
    run = Run(path)
    assert run.trained
    assert (path / "report.md").is_file()
    assert json.loads((path / "training.json").read_text())["world_size"] == 2
    assert f"trained with node 0 at {nodes.environment(1)['STARLOOM_RDZV_ENDPOINT']}" in ended[1][1]
    assert [line["step"] for line in read_lines(path / "metrics.jsonl") if "loss" in line]
