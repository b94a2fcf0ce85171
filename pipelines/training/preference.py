"""The preference stage: direct preference optimisation of a trained model (arXiv 2305.18290).

trl (the extra `starloom[trl]`) has the loss and the loop; the token ids are ours, so that a pair is
rendered as in fine-tuning. An adapter is trained: with it switched off, the model is its own
reference, and no second copy is held.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import Field

from pipelines.errors import PreflightError, TrainingError
from pipelines.section import Count, Section
from pipelines.training_settings import Adapter

MISSING = "the preference stage needs trl, which is not installed; install 'starloom[trl]'"
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class Preference(Section):
    """Settings of the stage, with the names of trl.DPOConfig and peft.LoraConfig."""

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0e-6
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: int = -1
    per_device_train_batch_size: Count = 2
    gradient_accumulation_steps: Count = 8
    gradient_checkpointing: bool = False
    seed: int = 42
    adapter: Adapter = Adapter(target_modules=("all-linear",))


def train_preferences(
    model_folder: Path,
    pairs: Mapping[str, Sequence[Any]],
    output: Path,
    settings: Preference,
    dtype: str = "float32",
) -> dict[str, float]:
    """Train on pairs (columns of token ids), and write a whole model to `output`.

    Returns the mean of the last logged steps: loss, accuracy (the share of pairs whose better
    answer gained more) and margin. Raises PreflightError without trl, TrainingError without pairs.
    """
    if find_spec("trl") is None:
        raise PreflightError(MISSING)
    if not len(pairs["prompt_ids"]):
        raise TrainingError("there are no preference pairs to train on; set sources.N.pairs: true")
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
        )
        trainer.train()
    logs = [line for line in trainer.state.log_history if "rewards/margins" in line][-1]
    save_trained(model, output, model_folder, dtype)
    return {
        "loss": float(logs["loss"]),
        "accuracy": float(logs["rewards/accuracies"]),
        "margin": float(logs["rewards/margins"]),
    }


def _arguments(settings: Preference, folder: Path, dtype: str) -> Any:
    import torch
    from trl import DPOConfig

    return DPOConfig(
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


def _trainer(**options: Any) -> Any:
    from trl import DPOTrainer

    class PairTrainer(DPOTrainer):  # type: ignore[misc]
        """DPOTrainer on token ids that are made already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return PairTrainer(**options)
