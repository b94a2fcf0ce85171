"""The preference stage: direct preference optimisation of a trained model (arXiv 2305.18290).

trl (the extra `starloom[trl]`) has the loss and the loop; the token ids are ours, so that a pair is
rendered as in fine-tuning. An adapter is trained: with it switched off, the model is its own
reference, and no second copy is held.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.errors import PreflightError, TrainingError
from pipelines.settings.preference import Preference

MISSING = (
    "the preference stage needs trl, which is not installed; `pip install -e .[trl]` in the "
    "checkout"
)
NO_PAIRS = (
    "there are no preference pairs to train on; set `pairs: true` in a source of type oasst or "
    "stack-exchange and run the recipe again"
)
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")

Columns = Mapping[str, Sequence[Any]]


def check_trl() -> None:
    """Raise PreflightError where trl is not installed."""
    if find_spec("trl") is None:
        raise PreflightError(MISSING)


def train_preferences(
    model_folder: Path,
    pairs: Columns,
    output: Path,
    settings: Preference,
    dtype: str = "float32",
    *,
    held_out: Columns | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """Train on pairs (columns of token ids), and write a whole model to `output`.

    Returns the last logged step's loss, accuracy (the share of its pairs whose better answer gained
    more) and margin, and `held_out`, see `compare_answers`. Every step's numbers go to `log`, as
    JSON lines. Raises PreflightError without trl, TrainingError without pairs.
    """
    check_trl()
    if not len(pairs["prompt_ids"]):
        raise TrainingError(NO_PAIRS)
    from datasets import Dataset

    from pipelines.training.adapters import add_adapter
    from pipelines.training.models import load_tokenizer, load_trained, save_trained

    model = add_adapter(load_trained(model_folder), settings.adapter, [])
    tokenizer = load_tokenizer(model_folder)
    with TemporaryDirectory() as folder:  # the trainer insists on one, and leaves it empty
        trainer = _trainer(
            model=model,
            args=_arguments(settings, Path(folder), dtype),
            train_dataset=Dataset.from_dict({name: list(pairs[name]) for name in COLUMNS}),
            processing_class=tokenizer,
            callbacks=[_step_log(log)] if log else None,
        )
        before = answer_log_probs(model, held_out) if held_out else []
        trainer.train()
    lines = [line for line in trainer.state.log_history if "rewards/margins" in line]
    after = answer_log_probs(model, held_out) if held_out else []
    save_trained(model.cpu(), output, model_folder, dtype)
    return {
        "loss": float(lines[-1]["loss"]),
        "accuracy": float(lines[-1]["rewards/accuracies"]),
        "margin": float(lines[-1]["rewards/margins"]),
        "steps": int(trainer.state.global_step),
        "held_out": compare_answers(before, after, settings.beta),
    }


def answer_log_probs(model: Any, pairs: Columns) -> list[tuple[float, float]]:
    """Return the log-probability of the better and of the worse answer of each pair, in nats.

    It is the sum over the answer's tokens; each text goes through the model by itself, unpadded.
    """
    import torch

    was_training = model.training
    model.eval()
    found = []
    with torch.inference_mode():
        for prompt, better, worse in zip(*(pairs[name] for name in COLUMNS), strict=True):
            both = _log_prob(model, prompt, better), _log_prob(model, prompt, worse)
            found.append(both)
    model.train(was_training)
    return found


def compare_answers(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], beta: float
) -> dict[str, Any] | None:
    """Return what preference training did on held-out pairs, None where there are none.

    `accuracy_before` and `accuracy_after` are the share of pairs whose better answer is the
    likelier one; `reward_accuracy` is the share whose better answer gained more than the worse one,
    and `reward_margin` by how much, times beta: the implicit reward of DPO.
    """
    if not before:
        return None
    gains = [
        beta * ((new[0] - old[0]) - (new[1] - old[1]))
        for old, new in zip(before, after, strict=True)
    ]
    number = len(gains)
    return {
        "pairs": number,
        "accuracy_before": sum(better > worse for better, worse in before) / number,
        "accuracy_after": sum(better > worse for better, worse in after) / number,
        "reward_accuracy": sum(gain > 0 for gain in gains) / number,
        "reward_margin": sum(gains) / number,
    }


def _log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    import torch

    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    targets = ids[0, len(prompt) :, None]
    return float(logits.log_softmax(-1).gather(1, targets).sum())


def _arguments(settings: Preference, folder: Path, dtype: str) -> Any:
    import torch
    from trl import DPOConfig

    from pipelines.training.arguments import keep_to_one_gpu

    arguments = DPOConfig(
        output_dir=str(folder),
        **settings.model_dump(exclude={"adapter"}),
        max_length=None,  # pairs that are too long were dropped, not cut
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    keep_to_one_gpu(arguments)
    return arguments


def _step_log(path: Path) -> Any:
    from transformers import TrainerCallback

    class StepLog(TrainerCallback):  # type: ignore[misc]
        """Appends what each step logs to a file of JSON lines."""

        def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'step': state.global_step, **logs})}\n")

    return StepLog()


def _trainer(**options: Any) -> Any:
    from trl import DPOTrainer

    class PairTrainer(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer on token ids that are made already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return PairTrainer(**options)
