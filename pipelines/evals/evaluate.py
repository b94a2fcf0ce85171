"""Evaluates a trained run: `python -m pipelines.evals.evaluate --run RUN --store STORE`.

It runs in a process of its own, so what it loads is what was saved. The scorecard is written last:
where there is one, everything else of the evaluation is there.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from pipelines.engine import usage
from pipelines.errors import StarloomError
from pipelines.evals.report import report_text, scorecard_text
from pipelines.evals.samples import Prompt, Sample, choose_prompts, complete_prompts
from pipelines.evals.scorecard import bootstrap_improvement, scorecard_parts, verdict
from pipelines.lineage import build_lineage
from pipelines.manifest import Shard, digest_of
from pipelines.recipe import Recipe, load_hardware
from pipelines.render.encode import load_tokenizer
from pipelines.runs import Run
from pipelines.serve.generate import pick_device
from pipelines.store import Store, write_atomic
from pipelines.training.collate import PackedDataset
from pipelines.training.loss import EvalLoss, evaluate_loss, validation_rows
from pipelines.training.models import build_model, load_trained
from pipelines.training.separate import ERROR

logger = logging.getLogger(__name__)

# How far the validation loss may differ after saving: sums in another order, or rounded weights.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-2}
BOOTSTRAP_SEED = 42


def evaluate_run(run: Run, store: Store) -> dict[str, Any]:
    """Evaluate a trained run, write its scorecard, samples, report and lineage; return the first.

    Raises StarloomError where the saved model is not the one that was trained, StoreError where
    data that it was trained on is gone or changed, TrainingError where nothing is held out.
    """
    started = time.monotonic()
    parts, recipe, refs = scorecard_parts(run), run.recipe(), run.refs()
    training = run.read("training.json") or {}
    lineage = build_lineage(run, store)
    packed, tokenizer_dir = store.path(refs["pack"]), store.path(refs["tokenizer"])
    test = PackedDataset(packed, "test")
    test_shards = [path for _, path in store.shards(refs["split"], "test")]
    device, hardware = pick_device(recipe), load_hardware(recipe.hardware)
    workers = hardware.processes_per_node if hardware.device == "cpu" else 1

    model = load_trained(run.model).to(device)
    validation = PackedDataset(packed, "validation")
    check = check_reload(run, training, model, validation, workers)
    logger.info("reload check: %s", check)
    after = row_losses(model, test, workers)
    twins = twin_losses(model, packed, store.shards(refs["pack"]), workers)
    samples = _samples(model, run, recipe, test_shards)
    del model
    # Step 0 in the precision that is saved: rounding must not count for or against training.
    untrained = build_model(recipe, tokenizer_dir).eval()
    untrained.to(device, getattr(torch, recipe.model.dtype))
    before = row_losses(untrained, test, workers)

    scorecard = {
        "key": digest_of(parts),
        "key_parts": parts,
        "run": run.name,
        **compare(before, after),
        "min_improvement": recipe.evaluation.min_improvement,
        "reload_check": check,
        "fim": twins,
        "device": device,
        "seconds": round(time.monotonic() - started, 3),
        "cpu_seconds": round(usage().cpu, 3),
        "peak_rss": usage().peak_rss,
    }
    decision = verdict(scorecard)
    scorecard |= {"accepted": decision.accepted, "reason": decision.reason}
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    write_atomic(run.path / "samples.jsonl", "".join(lines))
    run.write("lineage.json", lineage)
    write_atomic(run.path / "scorecard.md", scorecard_text(scorecard))
    report = report_text(recipe, lineage, training, scorecard, samples)
    write_atomic(run.path / "report.md", report)
    run.write("scorecard.json", scorecard)
    return scorecard


def check_reload(
    run: Run, training: dict[str, Any], model: Any, validation: PackedDataset, workers: int
) -> dict[str, Any]:
    """Compare the reloaded model's validation loss with the one its weights had in training.

    Both are over the same rows. Raises StarloomError where they differ by more than the tolerance
    of the model's dtype.
    """
    # The best checkpoint's weights may be those of an earlier step.
    step = training.get("model_step", training["global_step"])
    last = next((entry for entry in training["eval"] if entry["step"] == step), None)
    if last is None:
        return {"status": "not made", "reason": "training did not end with a validation"}
    found = sum(
        row_losses(model, validation, workers, rows=validation_rows(len(validation))),
        EvalLoss(0.0, 0),
    )
    tolerance = TOLERANCES[run.recipe().model.dtype]
    same = found.tokens == last["tokens"] and abs(found.loss - last["loss"]) <= tolerance
    if not same:
        raise StarloomError(
            f"run {run.name}: the saved model is not the one that was trained: its validation loss "
            f"is {found.loss:.5f} on {found.tokens:,} tokens, training ended with "
            f"{last['loss']:.5f} on {last['tokens']:,} (tolerance {tolerance:g}); train it again "
            "with --force"
        )
    return {
        "status": "equal",
        "step": last["step"],
        "in_training": last["loss"],
        "reloaded": found.loss,
        "tokens": found.tokens,
        "tolerance": tolerance,
    }


def twin_losses(
    model: Any, packed: Path, shards: Sequence[tuple[Shard, Path]], workers: int
) -> dict[str, float]:
    """Return the loss (nats per token) on the same held-out code in each order, {} without code.

    Orders are `none` (left to right), `psm` and `spm`; of each a fixed part of the rows is read.
    """
    present = {shard.split for shard, _ in shards if shard.rows}
    found = {}
    for order in ("none", "psm", "spm"):
        if f"validation.{order}" in present:
            twin = PackedDataset(packed, f"validation.{order}")
            rows = validation_rows(len(twin))
            total = sum(row_losses(model, twin, workers, rows=rows), EvalLoss(0.0, 0))
            found[order] = total.loss
    return found


def row_losses(
    model: Any, dataset: PackedDataset, workers: int, *, rows: Sequence[int] | None = None
) -> list[EvalLoss]:
    """Return the loss of every packed row (or of those named) by itself; they add up.

    Rows go to threads whole: sharing the small matrices of one row among threads costs more than
    it brings, above all on a busy machine.
    """

    def evaluate(row: int) -> EvalLoss:
        return evaluate_loss(model, dataset, 1, model.device, rows=[row])

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(evaluate, range(len(dataset)) if rows is None else rows))


def compare(before: list[EvalLoss], after: list[EvalLoss]) -> dict[str, Any]:
    """Return both losses with perplexity, rows, tokens, and the improvement with its interval.

    Numbers that are not finite become None, and then there is no improvement. Raises TrainingError
    where no token of the rows is trained.
    """
    sums = [sum(losses, EvalLoss(0.0, 0)) for losses in (before, after)]
    finite = all(math.isfinite(total.loss) for total in sums)
    return {
        "step0": _summary(sums[0]),
        "trained": _summary(sums[1]),
        "rows": len(after),
        "tokens": sums[1].tokens,
        "improvement": bootstrap_improvement(
            [row.nll for row in before],
            [row.nll for row in after],
            [row.tokens for row in after],
            seed=BOOTSTRAP_SEED,
        )
        if finite
        else None,
    }


def main() -> None:
    """Evaluate the run named on the command line; what a user can cause ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--store", type=Path, required=True, help="folder of the stage store")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    disable_progress_bar()
    try:
        scorecard = evaluate_run(Run(options.run), Store(options.store))
    except StarloomError as error:
        logger.error("%s%s", ERROR, error)  # noqa: TRY400 - a user's error has no traceback
        sys.exit(1)
    logger.info("%s", scorecard["reason"])


def _samples(model: Any, run: Run, recipe: Recipe, shards: list[Path]) -> list[Sample]:
    tokenizer = load_tokenizer(run.model)
    context = int(model.config.max_position_embeddings)
    prompts: list[Prompt] = choose_prompts(
        shards, recipe, tokenizer, context=context, folder=run.model
    )
    return complete_prompts(
        model, tokenizer, prompts, max_new_tokens=recipe.evaluation.max_new_tokens
    )


def _summary(total: EvalLoss) -> dict[str, float | None]:
    return {"loss": _finite(total.loss), "perplexity": _finite(total.perplexity)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
