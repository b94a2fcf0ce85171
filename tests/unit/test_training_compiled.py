"""training.torch_compile: the same losses from one graph, and what it is refused for."""

import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from transformers import GPTBigCodeConfig

from pipelines.errors import PreflightError, TrainingError
from pipelines.jsonlines import read_lines
from pipelines.overrides import apply_smoke
from pipelines.preflight import checks
from pipelines.settings.hardware import Hardware
from pipelines.training import compile_checks, compiled, finish, varlen
from pipelines.training.adopt import adopt_checkpoint
from pipelines.training.attention import build_twin
from pipelines.training.collate import FlatShape, PassedDataset
from pipelines.training.compile_checks import compile_problems
from pipelines.training.head_loss import HeadLoss
from pipelines.training.trainer import train
from tests.assets.packed_batches import make_batch
from tests.assets.training_runs import BLOCK, make_recipe, make_run

GPU = Hardware(device="cuda", strategy="ddp")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def attend_masked(query, key, value, cu_seq_lens, scale, sliding_window):
    """Attend as CUDA's kernel does for torch.compile: without a look at the boundaries' values."""
    position = torch.arange(query.shape[2])
    document = torch.bucketize(position, cu_seq_lens[1:], right=True)
    behind = position[:, None] - position
    allowed = (document[:, None] == document) & (behind >= 0)
    key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=scale
    ).transpose(1, 2)


@pytest.fixture
def graphs(monkeypatch):
    """Count the graphs that are made, and keep this process as it was."""
    handler = signal.getsignal(signal.SIGTERM)
    counter = CompileCounter()
    monkeypatch.setattr(compiled, "BACKEND", counter)
    monkeypatch.setattr(varlen, "attend_documents", attend_masked)
    monkeypatch.setattr(finish, "draw_loss", lambda *_: None)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield counter
    torch._dynamo.reset()
    signal.signal(signal.SIGTERM, handler)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def train_here(root, **training):
    """Train an epoch of 40 rows, 16 a step, in this process; return the run."""
    steps = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "logging_steps": 1}
    values = {**steps, "per_device_train_batch_size": 16, "save_total_limit": 3, **training}
    settings = {f"training__{name}": value for name, value in values.items()}
    recipe = make_recipe(model__dtype="float32", **settings)
    run, store = make_run(root, recipe, strategy="ddp", processes_per_node=1)
    run.checkpoints.mkdir()
    adopt_checkpoint(run)
    refs = run.refs()
    train(run, store.path(refs["pack"]), store.path(refs["tokenizer"]))
    return run


def losses(run):
    lines = read_lines(run.path / "metrics.jsonl")
    return [
        ((line["step"], key), line[key]) for line in lines for key in ("loss", "eval_loss")
        if key in line
    ]  # fmt: skip


def weight_names(path):
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


def test_a_compiled_run_goes_on_from_another_with_its_losses_and_names_in_one_graph(
    tmp_path, graphs
):
    plain = train_here(tmp_path)
    assert graphs.frame_count == 0
    first = str(plain.checkpoints / "checkpoint-1")
    fast = train_here(tmp_path, torch_compile=True, resume_from_checkpoint=first)
    # For both blocks and the last batch, which lacks half its rows; evaluations have none.
    assert graphs.frame_count == 1

    found, expected = losses(fast), losses(plain)
    assert [where for where, _ in found] == [where for where, _ in expected]
    for (where, value), (_, other) in zip(found, expected, strict=True):
        assert value == pytest.approx(other, abs=1e-6), where
    for name in ("checkpoints/checkpoint-3", "model"):
        file = f"{name}/model.safetensors"
        assert weight_names(fast.path / file) == weight_names(plain.path / file)


def test_an_adapter_over_checkpointed_blocks_keeps_losses_gradients_and_names(graphs):
    base = build_twin(GPTBigCodeConfig(vocab_size=64), varlen.register())
    model = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False)).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    names = list(model.state_dict())
    head, shape = HeadLoss(model, "dense"), FlatShape(32, 8, 16)
    batches = [make_batch(rows, fixed=shape) for rows in (((5, 9, 2), (7, 4)), ((3,),))]

    def step(batch):
        model.zero_grad()
        loss = head(model, batch)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        return loss.detach(), gradients

    expected = [step(batch) for batch in batches]
    compiled.compile_blocks(model)
    found = [step(batch) for batch in batches]
    assert graphs.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names


class Rows:
    most_documents = 5


def test_batches_have_room_for_the_row_with_most_documents_and_its_padding(graphs):
    recipe = make_recipe(training__torch_compile=True, training__per_device_train_batch_size=3)
    model = build_twin(GPTBigCodeConfig(vocab_size=64), varlen.register())
    assert compiled.compile_training(model, recipe, Rows()) == FlatShape(3 * BLOCK, 18, BLOCK)
    assert not torch._dynamo.config.optimize_ddp
    assert compiled.compile_training(model, make_recipe(), Rows()) is None


def test_the_most_documents_of_all_passes_count(monkeypatch):
    class Lists:
        def __init__(self, longest):
            self.longest = longest

    class Pass:
        def __init__(self, folder, name, **_):
            self.most_documents = {"train": 3, "train.1": 7, "train.2": 4}[name]

    monkeypatch.setattr("pipelines.training.collate.PackedDataset", Pass)
    monkeypatch.setattr(
        "pipelines.training.collate.splits_of", lambda _: {"train", "train.1", "train.2"}
    )
    assert PassedDataset("folder").most_documents == 7


@pytest.mark.parametrize(
    ("changes", "hardware", "reason"),
    [
        ({}, Hardware(device="cpu"), "hardware 'cpu' has no NVIDIA GPU to compile for (set "),
        ({}, Hardware(device="cuda", strategy="zero3"), "strategy zero3 gathers weights within"),
        (
            {},
            Hardware(device="cuda", strategy="fsdp2", processes_per_node=2),
            "(choose hardware with strategy ddp or zero2)",
        ),
        (
            {
                "model": {
                    "model_name_or_path": "nobody/nothing",
                    "quantization_config": {"load_in_4bit": True},
                },
                "adapter": LORA,
            },
            GPU,
            "a quantized base is not compiled (leave model.quantization_config out)",
        ),
        ({"adapter": {**LORA, "use_dora": True}}, GPU, "(set adapter.use_dora: false)"),
        ({"model__attn_implementation": "sdpa"}, GPU, "(set model.attn_implementation: auto)"),
        ({"model__dropout": 0.2}, GPU, "and the model has 0.2 (set model.dropout: 0.0)"),
        ({"model__dropout": None}, GPU, "and the model has 0.1 (set model.dropout: 0.0)"),
        ({"model__dtype": "float32"}, GPU, "(set model.dtype: bfloat16)"),
    ],
)
def test_what_cannot_or_need_not_be_compiled_is_refused_with_the_way_out(changes, hardware, reason):
    changes = {"model__dtype": "bfloat16", **changes} if "model" not in changes else changes
    recipe = make_recipe(training__torch_compile=True, **changes)
    (problem,) = compile_problems(recipe, hardware, here=False)
    assert problem.startswith("training.torch_compile: ")
    assert reason in problem
    assert problem.endswith("; or set it to false")
    off = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"torch_compile": False})}
    )
    assert compile_problems(off, hardware, here=True) == []


def test_a_machine_needs_a_compiler_and_pythons_headers(tmp_path, monkeypatch):
    recipe = make_recipe(training__torch_compile=True, model__dtype="bfloat16")
    monkeypatch.setattr(compile_checks.sysconfig, "get_path", lambda _: str(tmp_path))
    (problem,) = compile_problems(recipe, GPU, here=True, which=lambda _: None)
    assert "a C compiler is needed, and PATH has no gcc or clang" in problem
    assert f"Python's headers are needed, and {tmp_path / 'Python.h'} is missing" in problem
    assert compile_problems(recipe, GPU, here=False, which=lambda _: None) == []
    (tmp_path / "Python.h").touch()
    assert compile_problems(recipe, GPU, here=True, which=lambda name: name) == []


def test_preflight_refuses_it_on_a_cpu(tmp_path):
    with pytest.raises(PreflightError, match="torch_compile: hardware 'cpu' has no NVIDIA GPU"):
        checks.check(make_recipe(training__torch_compile=True), tmp_path)


def test_a_smoke_run_on_the_cpu_leaves_it_out():
    values = {"training": {"torch_compile": True}}
    apply_smoke(values)
    assert values["training"]["torch_compile"] is False


def test_training_ends_before_it_begins_where_the_model_cannot_be_compiled(monkeypatch):
    config = GPTBigCodeConfig(vocab_size=64)
    with pytest.raises(TrainingError, match="attention 'sdpa' has a mask of another shape in"):
        compiled.compile_blocks(build_twin(config, "sdpa"))
    model = build_twin(config, varlen.register())
    with monkeypatch.context() as patch:
        patch.setattr(model, "_no_split_modules", None)
        with pytest.raises(TrainingError, match="gpt_bigcode does not name its blocks"):
            compiled.compile_blocks(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "cuda_kernel", lambda: None)
    with pytest.raises(TrainingError, match="no kernel for varlen attention"):
        compiled.compile_blocks(model)
