"""The launcher without torch: its command, environment, DeepSpeed JSON, locks and refusals."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from pipelines.errors import Interrupted, StoreError, TrainingError
from pipelines.hardware_files import hardware_names
from pipelines.recipe import load_hardware, load_recipe, recipe_names
from pipelines.training import launch as launching
from pipelines.training.deepspeed_config import deepspeed_config
from pipelines.training.environment import (
    GROUP,
    KEEP_MEMORY,
    RETURN_MEMORY,
    child_environment,
    hardware_of,
    leave_group,
)
from pipelines.training.launch import command, launch
from tests.assets.training_runs import make_recipe, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture
def run_and_store(tmp_path):
    return make_run(tmp_path)


def fake(monkeypatch, *scripts):
    """Let each attempt run a shell script (in the run folder) instead of torchrun."""
    left = list(scripts)
    monkeypatch.setattr(launching, "command", lambda *_: ["sh", "-c", left.pop(0)])
    return left


def result(status, step=20):
    return json.dumps({"status": status, "global_step": step, "max_steps": 20, "error": "no luck"})


def checkpoint(step):
    folder = f"checkpoints/checkpoint-{step}"
    complete = json.dumps({"step": step, "files": {}})
    return f"mkdir -p {folder}; echo '{complete}' > {folder}/complete.json"


FINISH = f"mkdir model; echo '{result('finished')}' > training.json"


def test_the_command_is_plain_torchrun_on_one_node(made):
    run, store = made
    refs = run.refs()

    assert command(run, store) == [
        sys.executable, "-m", "torch.distributed.run",
        "--standalone", "--local-addr=127.0.0.1", "--nnodes=1", "--nproc-per-node=2",
        "-m", "--", "pipelines.training.trainer",
        f"--run={run.path}",
        f"--dataset={store.path(refs['pack'])}",
        f"--tokenizer={store.path(refs['tokenizer'])}",
    ]  # fmt: skip


def test_more_than_one_node_needs_a_place_to_meet(tmp_path, monkeypatch):
    monkeypatch.delenv("STARLOOM_RDZV_ENDPOINT", raising=False)
    run, store = make_run(tmp_path, num_nodes=2)
    with pytest.raises(TrainingError, match="num_nodes is 2: set rdzv_endpoint: HOST:29500"):
        launch(run, store)


def test_a_finished_run_is_returned_at_once_and_unchanged(run_and_store, monkeypatch):
    run, store = run_and_store
    fake(monkeypatch, FINISH)
    first = launch(run, store)
    log = (run.path / "train.log").read_bytes()

    assert launch(run, store) == first == json.loads(result("finished"))
    assert (run.path / "train.log").read_bytes() == log


def test_a_crash_is_started_again_as_long_as_it_makes_progress(run_and_store, monkeypatch, caplog):
    run, store = run_and_store
    left = fake(
        monkeypatch,
        f"{checkpoint(5)}; exit 1",
        f"{checkpoint(10)}; kill -9 $$",
        FINISH,
    )

    assert launch(run, store)["status"] == "finished"
    assert left == []
    assert "starting again from" in caplog.text
    assert "checkpoint-10" in caplog.text


def test_a_crash_without_a_new_checkpoint_is_an_error_with_the_end_of_the_log(
    run_and_store, monkeypatch
):
    run, store = run_and_store
    fake(monkeypatch, f"{checkpoint(5)}; exit 1", "seq 1 30; exit 9")

    with pytest.raises(TrainingError) as error:
        launch(run, store)

    text = "\n".join(str(number) for number in range(16, 31))
    assert str(error.value) == (
        f"run {run.name}: training failed (exit code 9), log {run.path / 'train.log'}:\n{text}"
    )


@pytest.mark.parametrize("death", ["kill -9 $$", "echo '  exitcode  : -9 (pid: 7)'; exit 1"])
def test_a_kill_before_the_first_checkpoint_is_retried_once_from_scratch(
    run_and_store, monkeypatch, death
):
    run, store = run_and_store
    left = fake(monkeypatch, death, death, FINISH)

    with pytest.raises(TrainingError, match="training failed"):
        launch(run, store)
    assert left == [FINISH]

    assert launch(run, store)["status"] == "finished"


TORCHRUN_KILLED = (
    "echo 'W1120 11:38:22.642000 7 torch/distributed/elastic/multiprocessing/api.py:1047] "
    "Unable to shutdown process 8 via 15, forcefully exiting via 9'; "
    "echo '  exitcode  : -9 (pid: 8)'; echo '  exitcode  : 1 (pid: 9)'; exit 1"
)


@pytest.mark.parametrize(
    "code", ["exit 1", "echo '  exitcode  : -15 (pid: 7)'; exit 1", TORCHRUN_KILLED]
)
def test_an_ordinary_crash_before_the_first_checkpoint_is_not_retried(
    run_and_store, monkeypatch, code
):
    run, store = run_and_store
    left = fake(monkeypatch, code, FINISH)
    with pytest.raises(TrainingError):
        launch(run, store)
    assert left == [FINISH]


def test_the_error_ends_with_what_the_ranks_wrote_last(run_and_store, monkeypatch):
    run, store = run_and_store
    fake(monkeypatch, f"echo 'ValueError: no luck'; {TORCHRUN_KILLED}")
    with pytest.raises(TrainingError, match=r"train\.log:\nValueError: no luck$"):
        launch(run, store)


def test_a_full_disk_is_named_with_what_is_kept_and_what_to_do(run_and_store, monkeypatch):
    run, store = run_and_store
    fake(monkeypatch, f"{checkpoint(5)}; exit 1", "exit 1")
    monkeypatch.setattr(launching.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(TrainingError) as error:
        launch(run, store)
    assert str(error.value) == (
        f"run {run.name}: no space left on the disk of {run.path}; the checkpoint of step 5 is "
        "kept. Free some space and run the same command again "
        f"(log: {run.path / 'train.log'})"
    )


def test_an_error_that_training_names_is_raised_in_its_words(run_and_store, monkeypatch):
    run, store = run_and_store
    left = fake(
        monkeypatch, f"{checkpoint(5)}; echo '{result('failed')}' > training.json; exit 1", FINISH
    )
    with pytest.raises(TrainingError, match=r"no luck \(log: ") as error:
        launch(run, store)
    assert not isinstance(error.value, Interrupted)
    assert left == [FINISH]


@pytest.mark.parametrize("script", ["exit 0", f"echo '{result('interrupted', 7)}' > training.json"])
def test_an_early_end_is_no_success_whatever_the_exit_code(run_and_store, monkeypatch, script):
    run, store = run_and_store
    fake(monkeypatch, f"{checkpoint(7)}; {script}")
    with pytest.raises(Interrupted, match="the checkpoint of step 7 is kept; start it again"):
        launch(run, store)


def test_an_old_result_is_not_taken_for_that_of_this_attempt(run_and_store, monkeypatch):
    run, store = run_and_store
    run.write("training.json", json.loads(result("interrupted", 7)))
    fake(monkeypatch, "exit 5")
    with pytest.raises(TrainingError, match="exit code 5") as error:
        launch(run, store)
    assert not isinstance(error.value, Interrupted)


def test_progress_is_reported_from_new_lines_only(run_and_store, monkeypatch):
    run, store = run_and_store
    line = {"step": 4, "max_steps": 20, "loss": 2.5, "tokens_per_second": 9.0, "seconds": 1}
    (run.path / "metrics.jsonl").write_text(json.dumps(line | {"step": 2}) + "\n")
    text = json.dumps(line) + '\n{"step": 4, "eval_loss": 1.0}\n{"step": 6, "lo'
    fake(monkeypatch, f"echo '{text}' >> metrics.jsonl; sleep 0.4; {FINISH}")
    monkeypatch.setattr(launching, "PROGRESS_SECONDS", 0.0)
    seen = []

    launch(run, store, on_progress=seen.append, poll_seconds=0.02)

    assert seen == [{"step": 4, "max_steps": 20, "loss": 2.5, "tokens_per_second": 9.0}]


def test_a_damaged_shard_is_refused_before_anything_starts(run_and_store, monkeypatch):
    run, store = run_and_store
    shard = store.path(run.refs()["pack"]) / "train-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    left = fake(monkeypatch, FINISH)
    store._hashed.clear()

    with pytest.raises(StoreError, match=r"train-00000\.arrow does not match its sha256"):
        launch(run, store)
    assert left == [FINISH]


def test_the_lock_is_free_after_an_owner_died_and_held_while_one_lives(run_and_store, monkeypatch):
    run, store = run_and_store
    fake(monkeypatch, FINISH)
    monkeypatch.setattr(launching, "HANDOVER_SECONDS", 0.5)
    code = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'a')\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, run.path / ".lock"], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    owner = {"host": os.uname().nodename, "boot_id": launching._boot_id(), "started": "today"}
    try:
        run.write("owner.json", owner | {"pid": holder.pid})
        with pytest.raises(TrainingError, match=f"trained by process {holder.pid} on .* today"):
            launch(run, store)
        run.write("owner.json", {"host": "elsewhere", "boot_id": "1", "pid": 1, "started": "now"})
        with pytest.raises(TrainingError, match="process 1 on elsewhere"):
            launch(run, store)
    finally:
        holder.kill()
        holder.wait()

    assert launch(run, store)["status"] == "finished"
    assert not (run.path / "owner.json").exists()


@pytest.mark.parametrize("stubborn", [False, True])
def test_ranks_that_a_killed_supervisor_left_are_gone_before_the_next_attempt(
    run_and_store, monkeypatch, stubborn
):
    run, store = run_and_store
    trap = "trap '' TERM; " if stubborn else ""
    orphan = subprocess.Popen(
        ["sh", "-c", f"{trap}echo up; while :; do sleep 0.1; done", "rank", f"--run={run.path}"],
        stdout=subprocess.PIPE,
    )
    assert orphan.stdout.readline() == b"up\n"
    monkeypatch.setattr(launching.end_orphans, "__defaults__", (1,))
    alive = f"kill -0 {orphan.pid} 2>/dev/null && echo together > together; {FINISH}"
    fake(monkeypatch, alive)

    launch(run, store)

    assert not (run.path / "together").exists()
    assert not psutil.pid_exists(orphan.pid)


def test_the_environment_is_an_allow_list_with_one_thread_per_rank():
    parent = {
        "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "HF_HOME": "/hf", "OMP_NUM_THREADS": "64",
        "HF_TOKEN": "secret", "AWS_SECRET_ACCESS_KEY": "secret", "PREFECT_API_KEY": "secret",
        "https_proxy": "secret", "DS_ACCELERATOR": "cuda",
    }  # fmt: skip

    found = child_environment(make_recipe(), load_hardware("cpu"), parent)

    assert found == {
        "PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "HF_HOME": "/hf", "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
        "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", **RETURN_MEMORY,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "strategy"),
    [
        ({"adapter": {"r": 4, "target_modules": ["c_attn"]}}, "ddp"),
        ({"training__gradient_checkpointing": True}, "ddp"),
        ({}, "zero2"),
        ({}, "zero3"),
    ],
)
def test_large_tensors_go_back_to_the_kernel_where_gaps_between_small_ones_are_lost(
    changes, strategy
):
    """glibc 2.36 took 2.0 GiB for 0.7 GiB of tensors (LoRA with recomputation)."""
    hardware = load_hardware("cpu").model_copy(update={"strategy": strategy})
    found = child_environment(make_recipe(**changes), hardware, {})
    on_gpu = child_environment(make_recipe(**changes), load_hardware("gpu"), {})

    assert found["MALLOC_MMAP_THRESHOLD_"] == str(2**20)
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert not {name for name in on_gpu if name.startswith(("MALLOC_", "GLIBC_"))}


def test_a_rank_that_is_alone_leaves_the_group_and_no_other_does(monkeypatch):
    for name in GROUP:
        monkeypatch.setenv(name, "1")
    alone = load_hardware("gpu")

    leave_group(alone.model_copy(update={"processes_per_node": 2}))
    leave_group(alone.model_copy(update={"strategy": "zero2"}))
    assert {os.environ[name] for name in GROUP} == {"1"}

    leave_group(alone)
    assert not GROUP & os.environ.keys()


def test_a_rank_that_is_alone_takes_one_of_the_gpus_it_sees(tmp_path, monkeypatch):
    import torch

    from pipelines.training.arguments import training_arguments

    for name in GROUP:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)

    arguments = training_arguments(
        make_recipe(), load_hardware("gpu"), tmp_path, fresh=True, blocks=[]
    )

    assert (str(arguments.device), arguments.n_gpu) == ("cuda:0", 1)
    assert arguments.train_batch_size == arguments.per_device_train_batch_size


def test_a_whole_model_on_a_rank_keeps_its_freed_tensors():
    hardware = load_hardware("cpu").model_copy(update={"strategy": "ddp"})

    assert KEEP_MEMORY.items() <= child_environment(make_recipe(), hardware, {}).items()


def test_a_gpu_is_chosen_and_its_memory_managed_as_the_user_says():
    given = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "1", "CUDA_LAUNCH_BLOCKING": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
    }  # fmt: skip

    found = child_environment(make_recipe(), load_hardware("gpu"), given)

    assert given.items() <= found.items()


def test_the_hub_token_goes_only_where_the_model_comes_from_the_hub(tmp_path):
    parent = {"HF_TOKEN": "secret", "https_proxy": "proxy"}
    hub = make_recipe(model={"model_name_or_path": "bigcode/starcoderbase-1b"})
    local = make_recipe(model={"model_name_or_path": str(tmp_path)})

    with_hub = child_environment(hub, load_hardware("gpu"), parent)
    assert (with_hub["HF_TOKEN"], with_hub["https_proxy"]) == ("secret", "proxy")
    assert "HF_HUB_OFFLINE" not in with_hub
    assert "DS_ACCELERATOR" not in with_hub
    for recipe in (local, make_recipe()):
        assert not set(parent) & set(child_environment(recipe, load_hardware("gpu"), parent))


def test_a_run_keeps_the_hardware_it_was_keyed_with(tmp_path):
    run, _ = make_run(tmp_path, strategy="ddp", processes_per_node=3)
    assert (hardware_of(run).strategy, hardware_of(run).processes_per_node) == ("ddp", 3)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("hardware", hardware_names())
def test_deepspeed_is_configured_by_the_recipe_alone(name, hardware):
    recipe, machine = load_recipe(name), load_hardware(hardware)
    config = deepspeed_config(recipe, machine)

    assert (config is None) == (machine.strategy in ("ddp", "fsdp2"))
    if config:
        training = recipe.training
        assert not {"optimizer", "scheduler"} & set(config)
        assert config["zero_optimization"]["stage"] == int(machine.strategy[-1])
        assert config["gradient_clipping"] == training.max_grad_norm
        assert config["bf16"] == {"enabled": recipe.model.dtype == "bfloat16"}
        assert config["train_batch_size"] == (
            training.per_device_train_batch_size
            * training.gradient_accumulation_steps
            * machine.processes_per_node
        )
        json.dumps(config)
