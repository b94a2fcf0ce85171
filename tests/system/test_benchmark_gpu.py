"""The GPU benchmark on tiny shapes: every arm runs, with nothing installed but what it names."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from benchmarks.gpu.arms import ARMS

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "transformers", "peft", "pyarrow", "pydantic", "pyyaml")


def closure(names):
    """Return the distributions and what they require, extras left out."""
    found, todo = {}, list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        requirements = found[name].requires or []
        todo += [re.match(r"[\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
    return found


@pytest.fixture
def bare_python(tmp_path):
    """Return a Python that has those packages and no others."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in closure(NEEDED).values():
        tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            source = Path(distribution.locate_file(top))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


def run(python, folder, *options):
    command = [python, "-m", "benchmarks.gpu.run", "--dry-run", "--output", str(folder), *options]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(1800)
def test_every_arm_runs_with_only_the_packages_that_the_benchmark_names(bare_python, tmp_path):
    missing = "import prefect, datasets, deepspeed"
    assert subprocess.run([bare_python, "-c", missing], check=False, capture_output=True).returncode
    folder = tmp_path / "results"
    done = run(bare_python, folder)
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    reasons = {r["arm"]: r.get("reason") for r in results if r["status"] != "ok"}
    assert reasons == {}, (folder / "log.txt").read_text()[-4000:]
    assert [r["arm"] for r in results] == list(ARMS)
    assert done.returncode == 0
    for result in results[1:]:
        assert result["tokens_per_second"] > 0
        assert result["useful_flops"] > 0
        assert len(result["spread"]) == 3
    real = {r["arm"]: r["tokens_per_second"] / r["positions_per_second"] for r in results[1:]}
    assert real["1b-script"] < 0.7  # padded
    assert min(real["1b-sdpa"], real["1b-varlen"], real["1b-starloom"], real["15b-sdpa"]) > 0.9
    assert "Not measured" not in (folder / "table.md").read_text()
    again = run(bare_python, folder)
    assert again.stdout.count("is there") == len(ARMS)


def test_the_same_arms_train_the_same_number_of_parameters(tmp_path):
    done = run(Path(sys.executable), tmp_path, "--arms", "1b-varlen", "15b-varlen")
    results = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    full, lora = results
    assert done.returncode == 0
    assert full["trained"] == full["parameters"] > 100_000
    # r x (width in + width out) of c_attn, attn.c_proj, c_fc and mlp.c_proj, in two layers
    wide, key, inner = 64, 16, 256
    matrices = [(wide, wide + 2 * key), (wide, wide), (wide, inner), (inner, wide)]
    assert lora["trained"] == 2 * 16 * sum(a + b for a, b in matrices)
    # Forwards and to the inputs only for what is frozen; all three products for the adapter.
    assert lora["flops_per_token"] == full["flops_per_token"] * 4 // 6 + 6 * lora["trained"]
