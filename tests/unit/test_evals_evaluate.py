"""Evaluation: the right losses, the model that was saved, and the files it leaves."""

import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import StarloomError
from pipelines.evals import evaluate as module
from pipelines.evals import launch
from pipelines.evals.evaluate import (
    check_reload,
    compare,
    evaluate_run,
    row_losses,
    twin_losses,
)
from pipelines.evals.launch import evaluate
from pipelines.evals.report import shorten, twins_text
from pipelines.evals.scorecard import scorecard_parts, verdict
from pipelines.lineage import build_lineage
from pipelines.manifest import Shard
from pipelines.runs import Run, open_run
from pipelines.store import Store
from pipelines.training.collate import PackedDataset
from pipelines.training.loss import EvalLoss, evaluate_loss, validation_rows
from pipelines.training.models import build_model, load_trained
from pipelines.training.separate import explain_failure
from tests.assets.finished_runs import make_finished_run, make_recipe_of_pairs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A trained run that nobody changes."""
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(run, store, scorecard) of a run evaluated in this process."""
    run, store = make_finished_run(tmp_path_factory.mktemp("evaluated"))
    return run, store, evaluate_run(run, store)


@pytest.fixture
def copied(finished, tmp_path):
    run, store = finished
    shutil.copytree(store.root.parent, tmp_path / "copy")
    return Run(tmp_path / "copy/runs" / run.name), Store(tmp_path / "copy/store")


def test_both_losses_are_those_of_the_test_split_before_and_after(evaluated):
    run, store, scorecard = evaluated
    refs = run.refs()
    test = PackedDataset(store.path(refs["pack"]), "test")
    untrained = build_model(run.recipe(), store.path(refs["tokenizer"]))
    before = evaluate_loss(untrained, test, 4, "cpu")
    after = evaluate_loss(load_trained(run.model), test, 4, "cpu")

    assert scorecard["step0"]["loss"] == pytest.approx(before.loss, abs=1e-6)
    assert scorecard["trained"]["loss"] == pytest.approx(after.loss, abs=1e-6)
    assert scorecard["trained"]["perplexity"] == pytest.approx(math.exp(after.loss), rel=1e-5)
    # Three documents; the first token of each is not predicted.
    packed = next(s for s in store.manifest(refs["pack"]).shards if s.split == "test")
    assert (scorecard["rows"], scorecard["tokens"]) == (2, packed.trained_tokens - 3)
    assert scorecard["improvement"]["nats"] == pytest.approx(before.loss - after.loss, abs=1e-6)
    assert scorecard["accepted"] is verdict(scorecard).accepted is True
    assert scorecard["reason"] == verdict(scorecard).reason


def test_the_losses_of_the_rows_add_up_to_that_of_the_dataset(evaluated):
    run, store, _ = evaluated
    train = PackedDataset(store.path(run.refs()["pack"]), "train")
    model = load_trained(run.model)

    rows = row_losses(model, train, 2)

    whole = evaluate_loss(model, train, 4, "cpu")
    assert len(rows) == len(train)
    assert sum(row.tokens for row in rows) == whole.tokens
    assert sum(row.nll for row in rows) == pytest.approx(whole.nll, rel=1e-5)


def test_the_evaluation_leaves_scorecard_samples_report_and_lineage(evaluated):
    run, store, scorecard = evaluated
    samples = [
        json.loads(line) for line in (run.path / "samples.jsonl").read_text().split("\n")[:-1]
    ]
    report = (run.path / "report.md").read_text()

    assert run.read("scorecard.json") == scorecard
    assert scorecard["key_parts"] == scorecard_parts(run)
    assert run.read("lineage.json") == build_lineage(run, store)
    assert [s["record_id"] for s in samples] == ["toy:6", "toy:4"]
    assert samples[0].keys() == {
        "record_id", "url", "license", "prompt", "reference", "completion", "stopped",
    }  # fmt: skip
    assert (samples[0]["prompt"], samples[0]["reference"]) == ("count to 1\n", "one two ")
    for text in (report, (run.path / "scorecard.md").read_text()):
        assert f"**{scorecard['reason'].replace('accepted', 'Accepted')}.**" in text
        assert f"| trained |                {scorecard['trained']['loss']:.4f} |" in text
    for line in (
        "![Training and validation loss over steps](loss.png)",
        "| kit    |      2.0 |     3 |       6 |               6 |    3 |       0 |",
        "| toy    | BSD-3-Clause |                       7 |",
        "| tokens seen                  | 12,345 ",
        "### 1. https://example.org/toy/3 (BSD-3-Clause)",
    ):
        assert line in report
    assert scorecard["seconds"] > 0
    assert scorecard["cpu_seconds"] > 0
    assert scorecard["peak_rss"] > 10_000_000


def test_the_reloaded_model_has_the_validation_loss_that_training_ended_with(evaluated):
    run, _, scorecard = evaluated
    last = run.read("training.json")["eval"][-1]

    check = scorecard["reload_check"]
    assert check == {
        "status": "equal",
        "step": 40,
        "in_training": last["loss"],
        "reloaded": pytest.approx(last["loss"], abs=1e-6),
        "tokens": last["tokens"],
        "tolerance": 1e-3,
    }


def test_weights_that_are_not_those_trained_fail_the_evaluation(copied):
    run, store = copied
    weights = load_file(run.model / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1.1
    save_file(weights, run.model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(StarloomError) as error:
        evaluate_run(run, store)

    assert str(error.value).startswith(
        f"run {run.name}: the saved model is not the one that was trained: its validation loss is "
    )
    assert str(error.value).endswith("(tolerance 0.001); train it again with --force")
    assert not (run.path / "scorecard.json").exists()


@pytest.mark.parametrize(
    ("dtype", "shift", "same"),
    [
        ("float32", 9e-4, True),
        ("float32", 1.1e-3, False),
        ("bfloat16", 1.9e-2, True),
        ("bfloat16", 2.1e-2, False),
    ],
)
def test_the_reload_check_allows_for_the_rounding_of_the_dtype_only(copied, dtype, shift, same):
    run, store = copied
    training = run.read("training.json")
    training["eval"][-1]["loss"] += shift
    recipe = run.recipe().model_dump(mode="json")
    recipe["model"]["dtype"] = dtype
    (run.path / "recipe.yaml").write_text(json.dumps(recipe))
    validation = PackedDataset(store.path(run.refs()["pack"]), "validation")

    def check():
        return check_reload(run, training, load_trained(run.model), validation, 1)

    if same:
        assert check()["status"] == "equal"
    else:
        with pytest.raises(StarloomError, match="not the one that was trained"):
            check()


def test_weights_of_the_best_checkpoint_are_held_to_the_loss_of_their_own_step(copied):
    run, store = copied
    training = run.read("training.json")
    best = dict(training["eval"][-1], step=7)
    training["eval"] = [best, {"step": training["global_step"], "loss": 99.0, "tokens": 1}]
    validation = PackedDataset(store.path(run.refs()["pack"]), "validation")
    model = load_trained(run.model)

    assert check_reload(run, training | {"model_step": 7}, model, validation, 1)["step"] == 7
    with pytest.raises(StarloomError, match="not the one that was trained"):
        check_reload(run, training, model, validation, 1)


def test_a_training_that_did_not_end_with_a_validation_is_not_compared(finished):
    run, _ = finished
    training = run.read("training.json") | {"global_step": 41, "model_step": 41}

    assert check_reload(run, training, None, None, 1) == {
        "status": "not made",
        "reason": "training did not end with a validation",
    }


def test_losses_that_are_not_finite_become_none_and_give_no_interval():
    before = [EvalLoss(50.0, 10), EvalLoss(30.0, 10)]
    after = [EvalLoss(math.nan, 10), EvalLoss(10.0, 10)]

    assert compare(before, after) == {
        "step0": {"loss": 4.0, "perplexity": math.exp(4.0)},
        "trained": {"loss": None, "perplexity": None},
        "rows": 2,
        "tokens": 20,
        "improvement": None,
    }


def test_a_completion_full_of_fences_does_not_break_the_report(copied, monkeypatch):
    run, store = copied
    nasty = "```\n</details><script>alert(1)</script>\n````\n# not a heading"
    sample = {
        "record_id": "toy:6", "url": "https://example.org/a|b](x)`", "license": "MIT",
        "prompt": nasty, "reference": nasty, "completion": nasty, "stopped": False,
    }  # fmt: skip
    monkeypatch.setattr(module, "complete_prompts", lambda *_, **__: [sample])
    evaluate_run(run, store)

    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark", {"html": True}).parse((run.path / "report.md").read_text())
    fences = [token.content for token in tokens if token.type == "fence"]
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]

    assert fences == [f"{nasty}\n"] * 3
    assert headings[-2:] == ["Samples", "1. https://example.org/a\\|b](x)\\` (MIT)"]
    assert not [token for token in tokens if token.type == "html_block"]


@pytest.mark.parametrize(
    ("text", "tail", "shown"),
    [
        ("a\n\n\n\nb", False, "a\n\n\n\nb"),
        ("a" + "\n" * 65 + "b", False, "a\n[64 empty lines]\nb"),
        ("x" * 601, False, "x" * 600 + "\n[1 characters more]"),
        ("y" + "x" * 600, True, "[1 characters before]\n" + "x" * 600),
    ],
)
def test_the_report_shortens_what_nobody_reads(text, tail, shown):
    assert shorten(text, tail=tail) == shown


def test_evaluation_runs_once_in_a_process_of_its_own(copied, monkeypatch):
    run, store = copied
    scorecard = evaluate(run, store)
    alone = dict(scorecard)

    def again(*_):
        raise AssertionError("evaluated twice")

    monkeypatch.setattr(launch, "_run_process", again)

    assert scorecard["accepted"]
    assert "accepted: held-out loss" in (run.path / "evaluate.log").read_text()
    assert evaluate(run, store) == alone
    stricter = make_recipe_of_pairs(evaluation__min_improvement=99.0)
    reopened = open_run(stricter, run.refs(), run.path.parent)
    assert reopened == run
    with pytest.raises(AssertionError, match="evaluated twice"):
        evaluate(reopened, store)


def test_code_that_changes_between_starter_and_evaluator_is_no_error(copied, monkeypatch):
    run, store = copied
    made = {"key_parts": {"code": "newer"}, "reason": "accepted"}
    monkeypatch.setattr(launch, "_run_process", lambda *_: run.write("scorecard.json", made))

    assert evaluate(run, store) == made


def test_an_evaluator_that_leaves_no_scorecard_is_an_error(copied, monkeypatch):
    run, store = copied
    monkeypatch.setattr(launch, "_run_process", lambda *_: None)

    with pytest.raises(StarloomError, match="the evaluation left no scorecard: .*evaluate.log"):
        evaluate(run, store)


def test_the_error_of_the_evaluator_is_passed_on_in_its_own_words(copied, monkeypatch, caplog):
    run, store = copied
    folder = store.path(run.refs()["language"])
    shutil.rmtree(folder)
    arguments = ["evaluate", "--run", str(run.path), "--store", str(store.root)]
    monkeypatch.setattr(sys, "argv", arguments)

    with pytest.raises(SystemExit) as stopped:
        module.main()
    log = run.path / "evaluate.log"
    log.write_text(f"a warning\n{caplog.messages[-1]}\n")

    assert stopped.value.code == 1
    assert explain_failure("the evaluation", log, 1) == (
        f"run {run.name}: stage 'language' ({folder}) is no longer in the store; "
        "`starloom run quickstart` builds it again"
    )


def test_a_crash_of_the_evaluator_ends_in_one_line_with_the_end_of_its_log(copied, monkeypatch):
    run, store = copied
    monkeypatch.setattr(launch, "EVALUATOR", "pipelines.no_such_module")

    with pytest.raises(StarloomError) as error:
        evaluate(run, store)

    text = str(error.value)
    assert text.startswith(f"run {run.name}: the evaluation failed (exit code 1): ")
    assert text.endswith(f"(all of it: {run.path / 'evaluate.log'})")
    assert "No module named pipelines.no_such_module" in text
    assert "\n" not in text


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_is_not_trained_is_not_evaluated(copied, status):
    run, store = copied
    run.write("training.json", run.read("training.json") | {"status": status})

    with pytest.raises(StarloomError) as error:
        evaluate(run, store)

    assert str(error.value) == (
        f"run {run.name} is not trained yet: `starloom run quickstart` resumes it"
    )


def test_step_0_is_measured_in_the_precision_that_is_saved(copied, monkeypatch):
    run, store = copied
    seen = []

    def spy(model, *arguments, **options):
        seen.append(model.dtype)
        return row_losses(model, *arguments, **options)

    monkeypatch.setattr(module, "row_losses", spy)
    recipe = run.recipe().model_dump(mode="json")
    recipe["model"]["dtype"] = "bfloat16"
    (run.path / "recipe.yaml").write_text(json.dumps(recipe))
    weights = load_file(run.model / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
        run.model / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((run.model / "config.json").read_text())
    (run.model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    evaluate_run(run, store)

    # Validation and test of the trained model, test of step 0.
    assert seen == [torch.bfloat16] * 3


def test_the_same_code_in_each_order_is_reported_apart(finished, tmp_path):
    run, store = finished
    model = load_trained(run.model)
    packed = store.path(run.refs()["pack"])
    shards = store.shards(run.refs()["pack"])
    validation = PackedDataset(packed, "validation")
    folder = tmp_path / "packed"
    shutil.copytree(packed, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    twins = [
        {**shard, "split": f"validation.{order}"}
        for shard in manifest["shards"]
        for order in ("none", "psm")
        if shard["split"] == "validation"
    ]
    manifest["shards"] += twins
    (folder / "manifest.json").write_text(json.dumps(manifest))

    losses = twin_losses(model, folder, [(Shard(**twin), folder) for twin in twins], 1)

    expected = evaluate_loss(
        model, validation, 1, "cpu", rows=validation_rows(len(validation))
    ).loss
    assert losses == pytest.approx({"none": expected, "psm": expected})
    assert twin_losses(model, packed, shards, 1) == {}
    assert twins_text(losses)[0].startswith("The same held-out code in each order")
    assert twins_text({}) == []
