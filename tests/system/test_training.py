"""Real torchrun, DeepSpeed and two CPU ranks: killed, stopped, resumed, without a compiler."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipelines.errors import Interrupted, TrainingError
from pipelines.jsonlines import read_lines
from pipelines.training.checkpoints import complete_checkpoints, newest_checkpoint, problem, step_of
from pipelines.training.collate import Collator, PackedDataset
from pipelines.training.launch import launch
from pipelines.training.loss import evaluate_loss
from pipelines.training.models import build_model, load_trained
from tests.assets.training_runs import make_recipe, make_run, write_tokenizer

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

LARGER = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 64}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}


def recipe(**overrides):
    """A model slow enough (tenths of a second a step) to be killed at a chosen step."""
    slow = {"model__config": LARGER, "training__per_device_train_batch_size": 8}
    return make_recipe(**slow | overrides)


def processes_of(run):
    """All processes that work on a run: supervisor, torchrun and ranks."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"--run={run.path}" in (process.info["cmdline"] or ())
    ]


def ranks_of(run):
    """The ranks of a run."""
    launcher = ("pipelines.training.supervise", "torch.distributed.run")
    return [p for p in processes_of(run) if not any(name in p.info["cmdline"] for name in launcher)]


def last_step(run):
    return max((line["step"] for line in read_lines(run.path / "metrics.jsonl")), default=-1)


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def curve(run):
    """The metrics without what depends on the clock and the machine."""
    clock = ("seconds", "tokens_per_second", "data_wait_share", "peak_rss")
    return [
        {key: value for key, value in line.items() if key not in clock}
        for line in read_lines(run.path / "metrics.jsonl")
    ]


def outcome(run):
    """What has to be the same after whatever happened: curve, losses and weights."""
    result = run.read("training.json")
    timed = ("seconds", "cpu_seconds", "peak_rss")
    weights = (run.model / "model.safetensors").read_bytes()
    return curve(run), {k: v for k, v in result.items() if k not in timed}, weights


def kill_at(run, step, pick=0):
    """Return a should_stop that kills one rank once, at a step, and never asks to stop."""
    killed = []

    def poll():
        if not killed and last_step(run) >= step:
            rank = sorted(ranks_of(run), key=lambda p: p.pid)[pick]
            rank.kill()
            killed.append(rank.pid)
        return False

    poll.killed = killed
    return poll


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run that nobody disturbs, on a PATH without compiler, ninja or nvcc."""
    root = tmp_path_factory.mktemp("undisturbed")
    (root / "bin").mkdir()
    run, store = make_run(root, recipe())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(root / "bin"))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(root / "extensions"))
        for name in ("CC", "CXX", "CUDA_HOME"):
            patch.delenv(name, raising=False)
        progress = []
        launch(run, store, on_progress=progress.append)
    assert not (root / "extensions").exists()
    return run, store, progress


def test_training_needs_no_compiler_and_leaves_a_complete_run(undisturbed):
    run, _, progress = undisturbed
    result = run.read("training.json")
    metrics = read_lines(run.path / "metrics.jsonl")

    assert run.trained
    assert (result["status"], result["global_step"], result["max_steps"]) == ("finished", 20, 20)
    assert [line["step"] for line in metrics if "loss" in line] == list(range(2, 21, 2))
    assert [entry["step"] for entry in result["eval"]] == [0, 10, 20]
    assert result["eval"][-1]["loss"] < result["eval"][0]["loss"] - 0.5
    assert (result["world_size"], result["tokens_seen"]) == (2, metrics[-2]["tokens"])
    assert result["parameters"] == 421_120  # 2 x 181,760, 384 x 128, 64 x 128, 256
    assert result["seconds"] > 0
    assert result["cpu_seconds"] > 0
    assert result["peak_rss"] > 2e8  # two Python processes with torch
    assert [step_of(c) for c in complete_checkpoints(run.checkpoints)] == [15, 20]
    assert set(progress[-1]) == {"step", "max_steps", "loss", "tokens_per_second"}
    assert {p.name for p in run.path.iterdir()} == {
        ".lock", "checkpoints", "loss.png", "metrics.jsonl", "model", "recipe.yaml", "run.json",
        "train.log", "training.json",
    }  # fmt: skip
    assert processes_of(run) == []


def test_the_reported_losses_are_those_of_the_models_on_disk(undisturbed):
    run, store, _ = undisturbed
    refs = run.refs()
    dataset = PackedDataset(store.path(refs["pack"]), "validation")
    result = run.read("training.json")

    untrained = evaluate_loss(
        build_model(run.recipe(), store.path(refs["tokenizer"])).eval(), dataset, 3, "cpu"
    )
    trained = evaluate_loss(load_trained(run.model), dataset, 3, "cpu")

    assert untrained.loss == pytest.approx(result["eval"][0]["loss"], abs=1e-5)
    assert trained.loss == pytest.approx(result["eval"][-1]["loss"], abs=1e-5)
    assert untrained.tokens == trained.tokens == result["eval"][0]["tokens"]


def test_the_first_step_has_the_exact_loss_and_gradient_of_all_its_tokens(tmp_path):
    run, store = make_run(
        tmp_path,
        make_recipe(
            training__max_steps=1,
            training__logging_steps=1,
            training__per_device_train_batch_size=5,
            training__gradient_accumulation_steps=4,
        ),
    )
    launch(run, store)

    # One step takes all 40 rows: 2 ranks x 5 rows x 4 accumulated batches.
    refs = run.refs()
    dataset = PackedDataset(store.path(refs["pack"]), "train")
    model = build_model(run.recipe(), store.path(refs["tokenizer"]))
    batch = Collator(0)([dataset[i] for i in range(40)])
    loss = model(**batch, use_cache=False).loss  # the mean over all tokens of one batch
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    (line,) = [x for x in read_lines(run.path / "metrics.jsonl") if "loss" in x]
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), abs=1e-4)
    assert line["tokens"] == sum(len(dataset[i].input_ids) for i in range(40))


@pytest.mark.parametrize("pick", [0, 1])
def test_a_rank_killed_at_a_random_step_changes_nothing(undisturbed, tmp_path, pick):
    step = random.randrange(6, 19)
    run, store = make_run(tmp_path, recipe())
    kill = kill_at(run, step, pick)

    launch(run, store, should_stop=kill, poll_seconds=0.01)

    assert len(kill.killed) == 1, f"killed at {step}"
    assert outcome(run) == outcome(undisturbed[0]), f"killed at step {step}"
    assert processes_of(run) == []


def test_a_rank_killed_before_the_first_checkpoint_starts_again_from_scratch(undisturbed, tmp_path):
    run, store = make_run(tmp_path, recipe())
    kill = kill_at(run, 0)

    launch(run, store, should_stop=kill, poll_seconds=0.01)

    assert len(kill.killed) == 1
    assert outcome(run) == outcome(undisturbed[0])


@pytest.mark.parametrize(("strategy", "adapter"), [("ddp", None), ("zero3", LORA)])
def test_other_strategies_and_adapters_resume_identically_too(tmp_path, strategy, adapter):
    overrides = {}
    if adapter:
        base = write_tokenizer(tmp_path / "base")
        build_model(recipe(), base).save_pretrained(base)
        model = {"model_name_or_path": str(base), "dtype": "float32"}
        overrides = {"model": model, "adapter": adapter | {"lora_dropout": 0.1}}
    runs = []
    for name in ("plain", "killed"):
        run, store = make_run(tmp_path / name, recipe(**overrides), strategy=strategy)
        kill = kill_at(run, 12) if name == "killed" else None
        launch(run, store, should_stop=kill, poll_seconds=0.01)
        runs.append(run)

    assert outcome(runs[1]) == outcome(runs[0])
    assert (runs[0].model / "adapter").is_dir() == bool(adapter)
    if adapter:
        saved = load_file(runs[0].model / "adapter" / "adapter_model.safetensors")
        assert len(saved) == 2 * 2 * 4
        assert all(tensor.abs().sum() > 0 for name, tensor in saved.items() if "lora_B" in name)


def test_a_stop_leaves_a_checkpoint_and_no_process_and_resumes_identically(undisturbed, tmp_path):
    run, store = make_run(tmp_path, recipe())

    with pytest.raises(Interrupted, match="start it again to resume"):
        launch(run, store, should_stop=lambda: last_step(run) >= 7, poll_seconds=0.01)

    stopped = newest_checkpoint(run.checkpoints)
    assert processes_of(run) == []
    assert run.read("training.json")["status"] == "interrupted"
    assert run.read("training.json")["global_step"] == step_of(stopped) < 20
    assert not run.model.exists()

    launch(run, store)

    assert outcome(run) == outcome(undisturbed[0])


def test_a_killed_launcher_takes_its_ranks_with_it_and_the_next_one_resumes(undisturbed, tmp_path):
    run, store = make_run(tmp_path, recipe())
    code = (
        "import sys; from pathlib import Path; from pipelines.runs import Run\n"
        "from pipelines.store import Store; from pipelines.training.launch import launch\n"
        "launch(Run(Path(sys.argv[1])), Store(Path(sys.argv[2])))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, run.path, store.root])
    wait_until(lambda: last_step(run) >= 6)
    launcher.kill()
    launcher.wait()

    launch(run, store)  # waits for the dying ranks, then goes on

    assert outcome(run) == outcome(undisturbed[0])
    assert processes_of(run) == []


@pytest.mark.parametrize("victim", ["pipelines.training.supervise", "torch.distributed.run"])
def test_a_killed_supervisor_or_torchrun_leaves_no_rank_and_changes_nothing(
    undisturbed, tmp_path, victim
):
    run, store = make_run(tmp_path, recipe())
    killed = []

    def kill():
        if not killed and last_step(run) >= 8:
            (process,) = [
                p
                for p in processes_of(run)
                if p.info["cmdline"][:3] == [sys.executable, "-m", victim]
            ]
            process.kill()
            killed.append(process.pid)
        return False

    # A killed supervisor's torchrun is told to stop by the kernel and writes a checkpoint.
    with contextlib.suppress(Interrupted):
        launch(run, store, should_stop=kill, poll_seconds=0.01)
    wait_until(lambda: processes_of(run) == [], 40)
    launch(run, store)

    assert len(killed) == 1
    assert outcome(run) == outcome(undisturbed[0])


def test_a_kill_after_the_last_step_commits_the_weights_without_training_on(undisturbed, tmp_path):
    run, store = make_run(tmp_path, recipe())
    launch(run, store)
    (run.path / "training.json").unlink()
    half = run.path / "model.tmp-1"
    run.model.rename(half)

    launch(run, store)

    assert outcome(run) == outcome(undisturbed[0])
    assert not half.exists()


def test_an_incomplete_checkpoint_is_passed_over_by_name(undisturbed, tmp_path):
    run, store = make_run(tmp_path, recipe())
    with pytest.raises(Interrupted):
        launch(run, store, should_stop=lambda: last_step(run) >= 11, poll_seconds=0.01)
    newest = newest_checkpoint(run.checkpoints)
    (newest / "complete.json").unlink()

    launch(run, store)

    assert f"{newest.name} is incomplete" in (run.path / "train.log").read_text()
    assert problem(newest) is not None or step_of(newest) in (15, 20)
    assert outcome(run) == outcome(undisturbed[0])


FULL_DISK = """
import subprocess, sys
from pathlib import Path
from pipelines.errors import TrainingError
from pipelines.runs import Run
from pipelines.store import Store
from pipelines.training.checkpoints import complete_checkpoints
from pipelines.training.launch import launch

run, store = Run(Path(sys.argv[1])), Store(Path(sys.argv[2]))
run.checkpoints.mkdir()
mount = ["mount", "-t", "tmpfs", "none", str(run.checkpoints), "-o"]
subprocess.run([*mount, "size=13m"], check=True)
try:
    launch(run, store)
except TrainingError as error:
    assert "no space left while saving" in str(error), error
    assert [c.name for c in complete_checkpoints(run.checkpoints)] == ["checkpoint-5"]
else:
    sys.exit("the disk did not fill up")
subprocess.run([*mount, "remount,size=64m"], check=True)
launch(run, store)
"""


def test_a_disk_that_fills_up_during_a_checkpoint_loses_nothing(undisturbed, tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    allowed = subprocess.run(
        [*namespace, "mount", "-t", "tmpfs", "none", tmp_path], check=False, capture_output=True
    )
    if allowed.returncode:
        pytest.skip("this machine does not allow a mount namespace, so no small disk")
    run, store = make_run(tmp_path, recipe())

    script = [sys.executable, "-c", FULL_DISK, run.path, store.root]
    done = subprocess.run([*namespace, *script], check=False, capture_output=True, text=True)

    assert (done.returncode, done.stderr[-2000:]) == (0, "")
    assert outcome(run) == outcome(undisturbed[0])


def test_a_loss_that_is_not_a_number_ends_training_with_one_line(tmp_path):
    run, store = make_run(tmp_path, make_recipe(training__learning_rate=1e30))

    with pytest.raises(TrainingError) as error:
        launch(run, store)

    assert not isinstance(error.value, Interrupted)
    assert "lower training.learning_rate" in str(error.value).lower()
    assert "\n" not in str(error.value)
    assert not run.model.exists()


def test_a_crash_is_reported_with_the_end_of_its_log_and_not_repeated(tmp_path):
    run, store = make_run(tmp_path, make_recipe())
    (run.path / "metrics.jsonl").mkdir()  # the trainer cannot write it: a crash, every time

    with pytest.raises(TrainingError, match="training failed") as error:
        launch(run, store)

    log = (run.path / "train.log").read_text()
    assert str(run.path / "train.log") in str(error.value)
    assert str(error.value).split("\n")[-1].startswith("IsADirectoryError: ")
    assert len(str(error.value).split("\n")) <= 16
    assert log.count("Root Cause (first observed failure)") == 1


def test_a_second_launcher_is_told_who_trains(tmp_path):
    run, store = make_run(tmp_path, recipe())
    refused = []

    def second():
        if not refused:
            with pytest.raises(TrainingError, match=f"trained by process {os.getpid()} on") as e:
                launch(run, store)
            refused.append(e)
        return True

    with pytest.raises(Interrupted):
        launch(run, store, should_stop=second)
    assert len(refused) == 1


def test_no_secret_of_the_parent_reaches_the_ranks_or_the_log(tmp_path, monkeypatch):
    canary = "hf_canary_0123456789"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, canary)
    run, store = make_run(tmp_path, recipe())
    seen = []

    def look():
        if last_step(run) >= 0:
            seen.extend(json.dumps(p.environ()) for p in processes_of(run))
        return bool(seen)

    with pytest.raises(Interrupted):
        launch(run, store, should_stop=look, poll_seconds=0.05)

    assert len(seen) == 4  # supervisor, torchrun, two ranks
    assert not any(canary in environment for environment in seen)
    files = [p for p in run.path.rglob("*") if p.is_file()]
    assert not any(canary.encode() in p.read_bytes() for p in files)


def test_a_signal_to_the_launching_process_stops_the_ranks_before_it_goes_on(tmp_path):
    run, store = make_run(tmp_path, recipe())

    def terminate(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)

    def deliver():
        if last_step(run) >= 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    try:
        with pytest.raises(KeyboardInterrupt):
            launch(run, store, should_stop=deliver, poll_seconds=0.05)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert processes_of(run) == []
    assert newest_checkpoint(run.checkpoints) is not None
