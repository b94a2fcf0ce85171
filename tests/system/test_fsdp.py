"""FSDP2 on two CPU ranks: really sharded, losses of DDP, identical resume; offload; deepspeed."""

import pytest
from safetensors.torch import load_file

from pipelines.errors import TrainingError
from pipelines.training.checkpoints import newest_checkpoint
from pipelines.training.launch import launch
from pipelines.training.models import build_model, load_trained
from pipelines.training.stored_weights import load_checkpoint
from tests.assets.training_runs import make_recipe, make_run, write_tokenizer
from tests.system.test_training import LORA, curve, kill_at, outcome, recipe

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

LLAMA = {"model_type": "llama", "n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 64}


def adapter_on(folder):
    base = write_tokenizer(folder / "base")
    build_model(recipe(), base).save_pretrained(base)
    model = {"model_name_or_path": str(base), "dtype": "float32"}
    return {"model": model, "adapter": LORA | {"lora_dropout": 0.1}}


@pytest.mark.parametrize("kind", ["full", "lora", "llama with gradient checkpointing"])
def test_fsdp2_has_the_losses_of_ddp_and_resumes_identically(tmp_path, kind):
    overrides = {
        "full": {},
        "lora": adapter_on(tmp_path) if kind == "lora" else {},
        "llama with gradient checkpointing": {
            "model__config": LLAMA,
            "training__gradient_checkpointing": True,
        },
    }[kind]
    runs = {}
    for name, strategy in (("ddp", "ddp"), ("plain", "fsdp2"), ("killed", "fsdp2")):
        run, store = make_run(tmp_path / name, recipe(**overrides), strategy=strategy)
        kill = kill_at(run, 12) if name == "killed" else None
        launch(run, store, should_stop=kill, poll_seconds=0.01)
        runs[name] = run

    assert outcome(runs["killed"]) == outcome(runs["plain"])
    for line, same in zip(curve(runs["plain"]), curve(runs["ddp"]), strict=True):
        for key in set(line) & {"loss", "grad_norm", "eval_loss"}:
            assert line[key] == pytest.approx(same[key], abs=1e-5)
    newest = newest_checkpoint(runs["plain"].checkpoints)
    assert (newest / "pytorch_model_fsdp_0").is_dir()
    assert len(list((newest / "optimizer_0").glob("*.distcp"))) == 2
    weights, others = (load_file(runs[n].model / "model.safetensors") for n in ("plain", "ddp"))
    assert weights.keys() == others.keys()
    # The keys' biases have no gradient but rounding, which Adam makes steps of: 1e-5 after 20.
    assert all((weights[k] - others[k]).abs().max() < 1e-4 for k in weights)


def test_a_sharded_checkpoint_gives_back_the_whole_weights(tmp_path):
    run, store = make_run(tmp_path, make_recipe(), strategy="fsdp2")
    launch(run, store)
    model = build_model(run.recipe(), store.path(run.refs()["tokenizer"]))

    load_checkpoint(model, newest_checkpoint(run.checkpoints))

    trained = load_trained(run.model).state_dict()
    assert all(bool((value == trained[key]).all()) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_offload_to_the_cpu_trains_the_same_without_a_compiler(
    tmp_path, monkeypatch, strategy, offload
):
    plain, store = make_run(tmp_path / "plain", make_recipe(), strategy=strategy)
    launch(plain, store)
    run, store = make_run(tmp_path / "offload", make_recipe(), strategy=strategy, offload=offload)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    launch(run, store)

    for line, same in zip(curve(run), curve(plain), strict=True):
        for key in set(line) & {"loss", "grad_norm", "eval_loss"}:
            assert line[key] == pytest.approx(same[key], abs=1e-4)
    assert not (tmp_path / "extensions").exists()


def test_deepspeeds_own_launcher_trains_a_run(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    values = {"launcher": "deepspeed", "hostfile": str(hostfile)}
    run, store = make_run(tmp_path / "run", make_recipe(), **values)
    same, _ = make_run(tmp_path / "same", make_recipe())
    launch(same, store)

    launch(run, store)

    assert outcome(run) == outcome(same)
    assert "HF_TOKEN" not in (run.path / "deepspeed.env").read_text()


def test_a_deepspeed_json_that_contradicts_the_recipe_ends_in_one_line(tmp_path):
    run, store = make_run(tmp_path, make_recipe(), deepspeed={"train_batch_size": 3})
    with pytest.raises(TrainingError, match="train_batch_size 3 .the recipe: 4") as error:
        launch(run, store)
    assert "\n" not in str(error.value)
