"""The optional stage after training: prefer the better of two answers, on the run's own records.

Pairs come from the train split of the run's data, rendered by its template and tokenizer, and what
it brings is measured on those of the test split, which stay held out. The result lies in
`preferred/` of the run, beside its `model/`; commands take it as RUN/preferred. It is made in a
process of its own (`python -m pipelines.prefer`), in a temporary folder that is renamed, and
`preferred.json` is written last: a run that was killed has the model it had before, or none.
"""

import argparse
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.curate.redact_text import find_edits, redact
from pipelines.errors import RecipeError, StarloomError, TrainingError
from pipelines.manifest import digest_of, sha256_file
from pipelines.overrides import set_dotted
from pipelines.recipe import Recipe
from pipelines.recipe_problems import explain
from pipelines.records import read_rows
from pipelines.render.encode import load_tokenizer
from pipelines.render.pairs import Pair, encode_pairs
from pipelines.render.templates import get_template
from pipelines.runs import PREFERRED, Run
from pipelines.settings.preference import Preference
from pipelines.store import Store, locked, sync_folder
from pipelines.training.environment import hardware_of
from pipelines.training.preference import COLUMNS, check_trl, train_preferences
from pipelines.training.reload import reload_folder
from pipelines.training.separate import ERROR, run_separately

logger = logging.getLogger(__name__)

MODULE, LOG, STEPS = "pipelines.prefer", "prefer.log", "prefer.jsonl"
RESULT = f"{PREFERRED}.json"
# More would cost more than they tell.
MAX_HELD_OUT = 1000
ROWS = 512


def preference_settings(recipe: Recipe, changes: Mapping[str, Any] | None = None) -> Preference:
    """Return the recipe's section `preference`, or its defaults, with dotted keys changed."""
    values = (recipe.preference or Preference()).model_dump(mode="json")
    problems = [set_dotted(values, key, value) for key, value in (changes or {}).items()]
    try:
        settings = Preference.model_validate(values)
    except ValidationError as error:
        problems.extend(explain(Preference, error))
        settings = None
    found = [problem for problem in problems if problem]
    if found or settings is None:
        raise RecipeError(f"preference: {'; '.join(found)}")
    return settings


def preferred_result(run: Run, settings: Preference) -> dict[str, Any] | None:
    """Return preferred.json where it belongs to this model and these settings."""
    result = run.read(RESULT)
    is_there = run.preferred().trained
    return result if is_there and result and result["key"] == _key(run, settings) else None


def prefer(run: Run, store: Store, settings: Preference) -> dict[str, Any]:
    """Return preferred.json of a trained run, making its preferred model where there is none yet.

    Raises TrainingError where the run is not trained, or its records hold no pairs; PreflightError
    without trl. The log is prefer.log of the run.
    """
    run = Run(run.path)  # RUN/preferred means its run: what is trained further is model/
    _check_trained(run)
    with locked(run.path / ".prefer.lock"):
        found = preferred_result(run, settings)
        if found is None:
            check_trl()
            _prefer_separately(run, store, settings)
            found = run.read(RESULT)
    if not found:
        raise StarloomError(f"run {run.name}: no {RESULT} was left: {run.path / LOG}")
    return found


def _prefer_separately(run: Run, store: Store, settings: Preference) -> None:
    for left_over in run.path.glob(f"{PREFERRED}.tmp-*"):
        shutil.rmtree(left_over)
    arguments = [f"--run={run.path.resolve()}", f"--store={store.root.resolve()}"]
    run_separately(
        f"run {run.name}: the preference stage",
        MODULE,
        [*arguments, f"--settings={settings.model_dump_json()}"],
        log=run.path / LOG,
        recipe=run.recipe(),
        hardware=hardware_of(run),
    )


def prefer_answers(run: Run, store: Store, settings: Preference) -> dict[str, Any]:
    """Train a finished run's model on its pairs, here; return and write what came of it."""
    _check_trained(run)
    (run.path / STEPS).unlink(missing_ok=True)
    pairs, dropped = read_pairs(run, store, "train")
    held_out, _ = read_pairs(run, store, "test")
    held_out = held_out[:: max(1, -(-len(held_out) // MAX_HELD_OUT))]
    temporary = run.path / f"{PREFERRED}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    key, dtype = _key(run, settings), run.recipe().model.dtype
    result = train_preferences(
        run.model,
        _columns(pairs),
        temporary,
        settings,
        dtype,
        held_out=_columns(held_out),
        log=run.path / STEPS,
    )
    reloaded = reload_folder(run, temporary)
    _commit(run, temporary)
    target = run.path / PREFERRED
    written = {
        "key": key,
        **result,
        "pairs": len(pairs),
        "dropped": dropped,
        "reload": reloaded,
        "settings": settings.model_dump(mode="json"),
        "model_files": {p.name: p.stat().st_size for p in target.iterdir() if p.is_file()},
    }
    written |= _decide(result["held_out"])
    run.write(RESULT, written)
    return written


def summary(result: Mapping[str, Any]) -> str:
    """Return what came of the stage in one line."""
    return f"{result['pairs']:,} pairs, {result['reason']}"


def read_pairs(run: Run, store: Store, split: str = "train") -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs of a split of a run's data, and what is left out of it by reason."""
    recipe, refs = run.recipe(), run.refs()
    tokenizer = load_tokenizer(run.model)
    # Both answers and the prompt have to be drawn alike: all with the system turn.
    settings = recipe.template.model_copy(update={"system_dropout": 0.0})
    template = get_template(settings, run.model)
    kinds = frozenset(recipe.redaction.kinds if recipe.redaction.enabled else ())
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for _, path in store.shards(refs["split"], split):
        rows = (row for row in read_rows(path) if row["text"] is None)
        while batch := list(islice(rows, ROWS)):
            found, without = encode_pairs(
                tokenizer,
                template,
                batch,
                recipe.tokenization.block_size,
                lambda text: redact(text, find_edits(text, kinds)),
            )
            pairs += found
            dropped.update(without)
    return pairs, dict(dropped)


def _check_trained(run: Run) -> None:
    if not run.trained:
        raise TrainingError(f"run {run.name} is not trained to its end yet; start it again first")


def _key(run: Run, settings: Preference) -> str:
    training = sha256_file(run.path / "training.json")
    return digest_of({"training": training, "settings": settings.model_dump(mode="json")})


def _columns(pairs: list[Pair]) -> dict[str, list[list[int]]]:
    return {name: [getattr(pair, name) for pair in pairs] for name in COLUMNS}


def _commit(run: Run, temporary: Path) -> None:
    """Put a finished folder in the place of the one before; the result is written after it."""
    for path in [p for p in temporary.rglob("*") if p.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    target = run.path / PREFERRED
    (run.path / RESULT).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync_folder(run.path)


def _decide(held_out: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return whether the better answers gained on held-out pairs, and the reason in words."""
    if held_out is None:
        return {"accepted": False, "reason": "not accepted: no pair is held out to measure it on"}
    accepted = held_out["reward_accuracy"] > 0.5 and held_out["reward_margin"] > 0
    return {
        "accepted": accepted,
        "reason": f"{'accepted' if accepted else 'rejected'}: held-out preference accuracy "
        f"{held_out['accuracy_before']:.3f} -> {held_out['accuracy_after']:.3f}, the better answer "
        f"gained in {held_out['reward_accuracy']:.1%} of {held_out['pairs']:,} pairs",
    }


def main() -> int:
    """Run the stage for the run named on the command line; an error ends in one line."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        settings = Preference.model_validate(options.settings)
        result = prefer_answers(Run(options.run), Store(options.store), settings)
    except StarloomError as error:
        logger.error("%s%s", ERROR, error)  # noqa: TRY400 - a user's error has no traceback
        return 1
    logger.info("%s", summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
