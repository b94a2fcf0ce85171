"""Nodes, commands and scripts of every launcher, and the dry run."""

import io
import json
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pipelines import cli
from pipelines.errors import TrainingError
from pipelines.hardware_files import hardware_names
from pipelines.recipe import load_hardware
from pipelines.settings.hardware import Hardware
from pipelines.training import launch as launching
from pipelines.training import launchers, nodes
from pipelines.training.dry_run import describe, prepared
from pipelines.training.environment import child_environment, environment_lines, hardware_of
from pipelines.training.launchers import find_node, hostfile_problems, slurm_script
from pipelines.training.nodes import Beat, Leader, Pulse
from tests.assets.training_runs import CLUSTER_VARIABLES, make_recipe, make_run, write_hardware


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


def starloom(*arguments):
    return CliRunner().invoke(cli.starloom, list(arguments))


LOOPBACK = {"STARLOOM_ALLOW_LOOPBACK": "1", "STARLOOM_RDZV_ENDPOINT": "127.0.0.1:29500"}


# Nodes


def two_nodes(**changes):
    return Hardware.model_validate({"device": "cpu", "num_nodes": 2, **changes})


def test_a_loopback_endpoint_is_refused_for_several_nodes_unless_it_is_allowed():
    environment = {"STARLOOM_RDZV_ENDPOINT": "localhost:29500"}
    with pytest.raises(TrainingError, match="localhost:29500 is a loopback address"):
        find_node(two_nodes(), environment)

    node = find_node(two_nodes(), LOOPBACK)

    assert node == launchers.Node("127.0.0.1", True, "127.0.0.1", "127.0.0.1:29500")
    assert find_node(two_nodes(), LOOPBACK | {"STARLOOM_NODE_RANK": "1"}).leader is False
    assert find_node(load_hardware("zero3"), environment) is None


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, r"num_nodes is 2: set rdzv_endpoint: HOST:29500 in the hardware file"),
        ({"STARLOOM_RDZV_ENDPOINT": "nowhere"}, "STARLOOM_RDZV_ENDPOINT: 'nowhere' is no HOST"),
        ({"STARLOOM_RDZV_ENDPOINT": "no.such.invalid:1"}, "'no.such.invalid' cannot be resolved"),
        (LOOPBACK | {"STARLOOM_NODE_RANK": "first"}, "STARLOOM_NODE_RANK='first': expected 0"),
    ],
)
def test_a_node_that_cannot_know_its_place_is_told_why(environment, problem):
    with pytest.raises(TrainingError, match=problem):
        find_node(two_nodes(), environment)


def test_slurm_says_which_node_this_is_in_its_jobs_only():
    environment = LOOPBACK | {"SLURM_NODEID": "1"}
    assert find_node(two_nodes(launcher="slurm"), environment).leader is False
    assert find_node(two_nodes(), environment).leader is True


def test_an_attempt_waits_for_all_nodes_and_has_an_id_of_its_own(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, num_nodes=2)
    leader = Leader(run, find_node(two_nodes(), LOOPBACK), 1)
    monkeypatch.setattr(nodes, "JOIN_SECONDS", 0.3)
    with pytest.raises(TrainingError, match="0 of 1 other node.s. came in 0.3 s .none."):
        leader.gather()

    other = Pulse(run, "nodes/1.json", {"status": "ready", "number": 2})
    other.update()
    leader.gather()

    told = run.read("attempt.json")
    assert (told["number"], told["status"], told["nodes"]) == (2, "training", ["1"])
    assert leader.rdzv_id == f"{run.name}-2"
    assert leader.lost() is False
    other.update(status="ended", code=0)
    assert leader.lost() is False
    other.update(status="ended", code=137)
    assert (leader.lost(), leader.killed) == (True, True)


def test_a_node_that_was_started_again_or_fell_silent_is_lost(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, num_nodes=2)
    leader = Leader(run, find_node(two_nodes(), LOOPBACK), 1)
    Pulse(run, "nodes/1.json", {"status": "ready", "number": 1}).update()
    leader.gather()
    assert not leader.lost()
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 0.0)
    assert leader.lost()
    monkeypatch.setattr(nodes, "SILENT_SECONDS", 100.0)
    assert not leader.lost()
    Pulse(run, "nodes/1.json", {"status": "here", "number": 0}).update()
    assert leader.lost()


def test_a_problem_of_another_node_is_raised_on_node_0(tmp_path):
    run, _ = make_run(tmp_path, num_nodes=2)
    leader = Leader(run, find_node(two_nodes(), LOOPBACK), 1)
    other = Pulse(run, "nodes/1.json", {"status": "failed", "error": "no disk", "number": 0})
    other.update()

    def beat():
        other.update()
        return False

    with pytest.raises(TrainingError, match="node 1: no disk"):
        leader.gather(beat)


def test_what_an_earlier_session_left_does_not_count_as_alive():
    beat = Beat()
    beat.see(None)
    beat.see({"session": "a", "beat": 7})
    assert not beat.alive
    beat.see({"session": "a", "beat": 7})
    assert not beat.alive
    beat.see({"session": "a", "beat": 8})
    assert beat.alive


def test_a_node_that_is_not_node_0_does_not_lead(tmp_path, monkeypatch):
    for name, value in (LOOPBACK | {"STARLOOM_NODE_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    run, store = make_run(tmp_path, num_nodes=2)
    with pytest.raises(TrainingError, match="this is node 1, not node 0 of 127.0.0.1:29500"):
        launching.launch(run, store)


# Commands


def test_the_agents_of_several_nodes_meet_at_node_0(tmp_path, monkeypatch):
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)
    run, store = make_run(tmp_path, num_nodes=2, processes_per_node=4)
    node = find_node(hardware_of(run))

    command = launching.command(run, store, node, "r-3")

    assert command[1:8] == [
        "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29500",
        "--rdzv-id=r-3", "--rdzv-conf=is_host=1,join_timeout=600", "--local-addr=127.0.0.1",
    ]  # fmt: skip
    assert command[8:10] == ["--nnodes=2", "--nproc-per-node=4"]
    assert launchers.node_environment(node, {}) == {
        "STARLOOM_NODE": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert launchers.node_environment(node, {"GLOO_SOCKET_IFNAME": "ib0"}) == {
        "STARLOOM_NODE": "127.0.0.1"
    }


def test_deepspeeds_launcher_reads_the_hostfile_and_its_ranks_get_no_secret(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# two machines\nnode0 slots=8\nnode1 slots=8 # the second\n")
    hardware = two_nodes(
        launcher="deepspeed", processes_per_node=8, hostfile=str(hostfile), rdzv_endpoint="node0:7"
    )
    target = launchers.Target("/r", "/d", "/t")

    assert hostfile_problems(hardware) == []
    assert launchers.launch_command(hardware, target, None, "")[1:] == [
        "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile}", "--num_nodes=2",
        "--num_gpus=8", "--master_addr=node0", "--master_port=7", "--no_local_rank",
        "--module", "pipelines.training.trainer", "--run=/r", "--dataset=/d", "--tokenizer=/t",
    ]  # fmt: skip
    lines = environment_lines(make_recipe(), hardware)
    assert "OMP_NUM_THREADS=1\n" in lines
    assert "DS_ENV_FILE=deepspeed.env\n" in lines
    parent = {"SSH_AUTH_SOCK": "/agent", "HF_TOKEN": "secret"}
    assert child_environment(make_recipe(), hardware, parent)["SSH_AUTH_SOCK"] == "/agent"
    assert "SSH_AUTH_SOCK" not in child_environment(make_recipe(), two_nodes(), parent)


def test_all_that_is_wrong_with_a_hostfile_is_said_at_once(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node0 slots=2\nnode0 slots=8\nnode1 8\n")
    hardware = two_nodes(launcher="deepspeed", processes_per_node=8, hostfile=str(hostfile))
    (problem,) = hostfile_problems(hardware)
    assert problem == (
        f"hostfile {hostfile}: line 2: node0 is named twice; "
        "line 3: 'node1 8' is not `HOST slots=N`; "
        "processes_per_node is 8, but node0 has fewer slots; num_nodes is 2, but it names 1 host(s)"
    )
    hostfile.unlink()
    assert "cannot be read" in hostfile_problems(hardware)[0]


def test_the_slurm_script_starts_the_same_command_on_every_node(tmp_path):
    hardware = two_nodes(
        device="cuda", launcher="slurm", processes_per_node=8, threads_per_process=4,
        slurm={"partition": "gpu", "requeue": True, "exclusive": False},
        environment_script="/opt/it's.sh",
    )  # fmt: skip

    script = slurm_script(hardware, "oasst", ["run", "oasst", "--data", "a b"], tmp_path)

    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0
    head, body = script.split("set -euo pipefail\n")
    assert head.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=starloom-oasst",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=32",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=gpu",
        "#SBATCH --requeue",
    ]
    source, data, meeting, srun = body.strip().splitlines()
    assert shlex.split(source) == ["source", "/opt/it's.sh"]
    assert data == f"export STARLOOM_DATA={tmp_path}"
    assert meeting == (
        'export STARLOOM_RDZV_ENDPOINT="$(scontrol show hostnames "$SLURM_JOB_NODELIST" '
        '| head -n 1):29500"'
    )
    assert shlex.split(srun)[3:] == ["-m", "pipelines.cli", "run", "oasst", "--data", "a b"]


# The dry run


def line_of(text):
    """The words of the first command that starts ranks, without the environment."""
    (start,) = [i for i, line in enumerate(text.splitlines()) if line.startswith("env ")][:1]
    words = shlex.split("\n".join(text.splitlines()[start : start + 2]).replace("\\\n", " "))
    command = next(i for i, word in enumerate(words) if i and "=" not in word)
    return words[1:command], words[command:]


@pytest.mark.parametrize("values", [{}, {"num_nodes": 2, "strategy": "ddp"}])
def test_the_dry_run_prints_what_launch_executes(tmp_path, monkeypatch, values):
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    text = "\n".join(f"{k}: {v}" for k, v in ({"device": "cpu"} | values).items())
    recipe = make_recipe(hardware=write_hardware(tmp_path, text))
    run, store = make_run(tmp_path, recipe)
    shown = describe(recipe, ["run", "quickstart"], tmp_path)
    executed = []

    class Process:
        returncode, stdin = 0, io.BytesIO()

        def __init__(self, command, *, env, **_):
            executed.append((command, env))

        def poll(self):
            (run.path / "model").mkdir()
            run.write("training.json", {"status": "finished"})
            return 0

    pipes = {"PIPE": subprocess.PIPE, "STDOUT": subprocess.STDOUT}
    monkeypatch.setattr(launching, "subprocess", SimpleNamespace(Popen=Process, **pipes))
    monkeypatch.setattr(launching, "verify", lambda *_: None)
    if values:
        (run.path / "nodes").mkdir()
        Pulse(run, "nodes/1.json", {"status": "ready", "number": 1}).update()
    launching.launch(run, store)

    ((command, environment),) = executed
    settings, printed = line_of(shown)
    assert command[command.index("--") + 1 :] == printed
    assert dict(word.split("=", 1) for word in settings).items() <= environment.items()
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=True).returncode == 0


def test_the_dry_run_of_new_data_is_a_script_that_prepares_it(made):
    run, store = made
    shown = describe(make_recipe(training__seed=9), ["run", "x y"], run.path.parents[1])

    assert "eval \"$(starloom run 'x y' --prepare-only)\"" in shown
    assert '--run="$RUN" --dataset="$DATASET" --tokenizer="$TOKENIZER"' in shown
    assert [line.partition("=")[0] for line in prepared(run, store).splitlines()] == [
        "RUN", "DATASET", "TOKENIZER"
    ]  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=True).returncode == 0


@pytest.mark.parametrize("hardware", hardware_names())
@pytest.mark.parametrize("recipe", ["quickstart", "oasst"])
def test_every_hardware_can_be_dry_run_without_data_gpus_or_network(recipe, hardware):
    shown = starloom("run", recipe, "--dry-run", "--set", f"hardware={hardware}")

    assert shown.exit_code == 0, shown.output
    assert f"--nproc-per-node={load_hardware(hardware).processes_per_node}" in shown.output
    config = shown.output.partition("<<'END'\n")[2].partition("\nEND")[0]
    strategy = load_hardware(hardware).strategy
    if strategy == "ddp":
        assert config == ""
    else:
        key = "version" if strategy == "fsdp2" else "zero_optimization"
        assert json.loads(config)[key]


def test_a_cluster_is_dry_run_where_its_node_0_is_not_known(tmp_path):
    path = write_hardware(
        tmp_path,
        "device: cuda\nnum_nodes: 2\nprocesses_per_node: 8\nstrategy: fsdp2\n"
        "rdzv_endpoint: node0.invalid:29500\n",
    )
    shown = starloom("run", "oasst", "--dry-run", "--set", f"hardware={path}")

    assert shown.exit_code == 0, (shown.output, shown.exception)
    _, leader, others = shown.output.split("# The ranks of ")
    assert leader.startswith("node 0:")
    assert others.startswith("every other node:")
    for text, is_host in ((leader, 1), (others, 0)):
        assert "--rdzv-endpoint=node0.invalid:29500" in text
        assert f"--rdzv-conf=is_host={is_host}," in text
        assert '--local-addr="$NODE_ADDRESS"' in text
    assert '"GPTBigCodeBlock"' in others
    bash = subprocess.run(["bash", "-n"], input=shown.output, text=True, check=True)
    assert bash.returncode == 0


def test_slurm_is_dry_run_as_a_script_and_run_by_writing_it(tmp_path, data_root):
    path = write_hardware(tmp_path, "device: cpu\nnum_nodes: 2\nlauncher: slurm\n")
    command = ["run", "quickstart", "--set", f"hardware={path}"]

    shown = starloom(*command, "--dry-run")
    written = starloom(*command)

    assert shown.exit_code == written.exit_code == 0, (shown.output, written.output)
    script = data_root / "slurm" / "quickstart.sbatch"
    assert written.output == f"submit  sbatch {script}\n"
    assert script.read_text().strip() in shown.output
    assert not (data_root / "store").exists()


def test_a_dry_run_says_all_that_is_wrong_with_the_hardware(tmp_path):
    path = write_hardware(
        tmp_path,
        "device: cpu\nnum_nodes: 2\ndeepspeed: {train_batch_size: 7}\n",
    )
    shown = starloom("run", "quickstart", "--dry-run", "--set", f"hardware={path}")
    assert "train_batch_size 7 (the recipe: 4" in str(shown.exception)
    assert "num_nodes is 2: set rdzv_endpoint" in str(shown.exception)
