"""Preflight: everything that is missing is said in one line, before any long work."""

import json
import shutil
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import yaml

from pipelines.errors import PreflightError
from pipelines.manifest import Manifest
from pipelines.preflight import checks
from pipelines.preflight.dataset import Dataset, trained_problems
from pipelines.preflight.machine import Machine
from pipelines.recipe import load_recipe, recipe_names
from tests.assets.training_runs import make_recipe, make_run

Disk = namedtuple("Disk", "total used free")
NO_GPU = Machine(memory=16 * 2**30)


def test_the_quickstart_is_ready_on_a_machine_without_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "look_around", lambda: NO_GPU)

    checks.check(load_recipe("quickstart"), tmp_path / "not" / "there" / "yet", train_here=True)


def test_a_disk_below_the_estimate_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(10**9, 9 * 10**8, 10**8))

    with pytest.raises(PreflightError) as error:
        checks.check(load_recipe("quickstart"), tmp_path)

    assert "0.1 GB free, about 0.7 GB needed; free some space or set STARLOOM_DATA" in str(
        error.value
    )


def test_a_recipe_that_lacks_source_model_and_gpu_names_all_three_in_one_line(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checks, "look_around", lambda: NO_GPU)

    nowhere = load_recipe("oasst", overrides={"sources.0.path": "nowhere"})
    with pytest.raises(PreflightError) as error:
        checks.check(nowhere, tmp_path, train_here=True)

    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("recipe oasst: ")
    assert "sources.0: path 'nowhere'" in text
    assert "model 'bigcode/starcoderbase' is not in the local cache" in text
    assert "hardware 'zero3' needs 8 GPU(s), 0 here" in text


def test_gpus_that_are_hidden_are_missed_with_the_name_of_what_hides_them(monkeypatch):
    two = Machine(2, "NVIDIA H200", 141e9, 10**12)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (plain,) = checks.hardware_problems(load_recipe("oasst"), two)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    (hidden,) = checks.hardware_problems(load_recipe("oasst"), two)

    assert plain.startswith("hardware 'zero3' needs 8 GPU(s), 2 here; ")
    assert hidden.startswith(
        "hardware 'zero3' needs 8 GPU(s), 2 here with CUDA_VISIBLE_DEVICES='2,3'; "
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_can_start_where_its_sources_can_be_fetched(name, tmp_path):
    checks.check(load_recipe(name, smoke=True), tmp_path)


def test_a_model_folder_with_pickle_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    recipe = load_recipe("scikit-learn", overrides={"model.model_name_or_path": str(tmp_path)})

    with pytest.raises(PreflightError, match=r"no \*.safetensors \(pickle weights are refused\)"):
        checks.check(recipe, tmp_path)


def test_the_parameter_count_equals_the_model_that_is_built():
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    recipe = load_recipe("quickstart")
    config = recipe.model.config
    model = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=4096,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            n_positions=config.n_positions,
            bos_token_id=0,
            eos_token_id=0,
        )
    )

    counted = checks.count_parameters(recipe)

    assert abs(counted / model.num_parameters() - 1) < 0.01


def test_the_data_stages_of_a_gated_model_ask_for_its_tokenizer_only(tmp_path, monkeypatch):
    named = "bigcode/starcoderbase-1b"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = load_recipe("scikit-learn")

    with pytest.raises(PreflightError) as error:
        checks.check(recipe, tmp_path, data_only=True)

    text = str(error.value)
    assert f"tokenizer of {named!r} is not in the local cache" in text
    assert f"accept its license on https://huggingface.co/{named}" in text
    assert "the data stages need its tokenizer.json only" in text
    assert "model.safetensors" not in text


@pytest.mark.parametrize(
    ("token", "who"), [(None, "no token is set here"), ("hf_x", "your token has no access to it")]
)
def test_gated_weights_without_access_name_page_and_login(token, who, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class Hub:
        def auth_check(self, name, repo_type):
            import httpx

            raise GatedRepoError(
                "403", response=httpx.Response(403, request=httpx.Request("GET", "https://x"))
            )

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)

    with pytest.raises(PreflightError) as error:
        checks.check(load_recipe("scikit-learn"), tmp_path)

    assert f"is gated and {who}: accept its license on" in str(error.value)
    assert "https://huggingface.co/bigcode/starcoderbase-1b" in str(error.value)
    assert "hf auth login" in str(error.value)
    assert "hf_x" not in str(error.value)


def test_a_revision_that_a_model_lacks_is_named(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    hub_http = sys.modules[HfHubHTTPError.__mro__[1].__module__]

    class Hub:
        def auth_check(self, name, repo_type):
            pass

        def repo_info(self, name, revision, repo_type, timeout):
            request = hub_http.Request("GET", "https://x")
            raise RevisionNotFoundError("404", response=hub_http.Response(404, request=request))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    recipe = load_recipe("scikit-learn", overrides={"model.revision": "v9"})

    with pytest.raises(PreflightError) as error:
        checks.check(recipe, tmp_path)

    page = "https://huggingface.co/bigcode/starcoderbase-1b"
    assert f"'bigcode/starcoderbase-1b' has no revision 'v9': see {page}; " in str(error.value)


def test_a_block_above_the_positions_of_a_hub_model_is_refused_without_the_model(tmp_path):
    recipe = load_recipe("scikit-learn", overrides={"tokenization.block_size": 16_384})

    with pytest.raises(PreflightError, match="block_size 16384 is above the 8192 positions"):
        checks.check(recipe, tmp_path)


def test_a_recipe_that_would_train_no_token_is_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"question number {i}, please"},
                          {"role": "assistant", "content": "an answer", "train": False}]}
            for i in range(4)]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "dataset", "id": "rows", "path": str(path), "allow_unlicensed": True}
    changes = {"sources": [source], "template": {"name": "chatml"}, "fim": {}}

    with pytest.raises(PreflightError, match="not one record with something to train on"):
        checks.check(load_recipe("quickstart", overrides=changes), tmp_path)


def test_a_run_whose_shards_do_not_fit_its_recipe_is_refused(tmp_path):
    run, store = make_run(tmp_path)
    checks.check_run(run, store)
    other = load_recipe("quickstart", overrides={"tokenization.block_size": 32})

    tokenizer = store.path(run.refs()["tokenizer"]) / "tokenizer.json"
    before = tokenizer.read_bytes()
    tokenizer.write_bytes(before.replace(b"filler0", b"filler_"))
    with pytest.raises(PreflightError, match="tokenizer.json does not match its sha256"):
        checks.check_run(run, store)

    tokenizer.write_bytes(before)
    manifest = Manifest.read(store.path(run.refs()["pack"]))
    replace(
        manifest, upstream={"tokenizer": "0" * 64}, key_parts={"params": {"block_size": 64}}
    ).write(store.path(run.refs()["pack"]))
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(other.model_dump(mode="json")))
    with pytest.raises(PreflightError) as error:
        checks.check_run(run, store)

    assert "packed with tokenizer 000000000000, but the run names" in str(error.value)
    assert "rows of 64 tokens, but tokenization.block_size is 32" in str(error.value)


def test_a_run_that_would_only_warm_up_is_warned_of_once_its_steps_are_known(tmp_path, caplog):
    one = {"max_steps": 1, "warmup_steps": 1, "lr_scheduler_type": "cosine"}
    run, store = make_run(tmp_path, make_recipe(**{f"training__{k}": v for k, v in one.items()}))

    checks.check_run(run, store)

    (text,) = caplog.messages
    assert text.startswith("training.warmup_steps: 1 of 1 steps are warmup, which begins at 0")


def test_a_dataset_without_a_trained_token_is_refused(tmp_path):
    dataset = Dataset(tmp_path, rows=3, tokens=90, trained_tokens=0)

    (problem,) = trained_problems(dataset)

    assert "3 rows with 0 trained tokens: nothing would be learned" in problem
    assert trained_problems(replace(dataset, trained_tokens=1)) == []
