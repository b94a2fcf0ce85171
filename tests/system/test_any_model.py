"""The model alone is changed: each architecture, whole and with an adapter, from data to gate."""

import json
import os
import subprocess

import pytest

from flows.services import ROOT
from tests.assets.live_server import BIN
from tests.assets.made_sources import make_source
from tests.assets.tiny_models import SHAPES, write_coder_model

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

ADAPTER = ("adapter.r=8", "adapter.target_modules=all-linear", "training.learning_rate=0.02")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data root and raw code that all runs share, so that most data stages are made once."""
    root = tmp_path_factory.mktemp("any-model")
    return root, make_source("qwen-coder", root / "raw")


@pytest.mark.parametrize("adapter", [(), ADAPTER], ids=["full", "lora"])
@pytest.mark.parametrize("model_type", sorted(SHAPES))
def test_another_base_model_is_trained_by_its_own_template(model_type, adapter, world):
    root, code = world
    texts = (path.read_text(encoding="utf-8") for path in sorted(code.rglob("*.py"))[:50])
    base = write_coder_model(root / f"{model_type}-{len(adapter)}", model_type, texts)
    overrides = (
        f"model.model_name_or_path={base}",
        f"sources.0.path={code}",
        "sources.0.license=PSF-2.0",
        "evaluation.min_improvement=0.05",
        *adapter,
    )

    done = subprocess.run(
        [
            BIN / "starloom",
            "run",
            "qwen-coder",
            "--smoke",
            *(f"--set={each}" for each in overrides),
        ],
        cwd=ROOT,
        env={**os.environ, "STARLOOM_DATA": str(root / "data")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    [line] = [line for line in done.stdout.split("\n") if line.startswith("run ")]
    model = root / "data" / "runs" / line.split()[1] / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == model_type
    assert (model / "adapter" / "adapter_model.safetensors").exists() == bool(adapter)
    stop = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert 2 in ([stop] if isinstance(stop, int) else stop)  # <|im_end|>, which ends the answers
