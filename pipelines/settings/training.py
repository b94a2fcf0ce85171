"""How a recipe trains: the adapter, and the subset of TrainingArguments that recipes set."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.settings.section import Count, Fraction, Section

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Keys that our own loop reads: TrainingArguments do not get them.
OWN_KEYS = frozenset(
    {
        "logging_steps", "save_total_limit", "load_best_model_at_end", "resume_from_checkpoint",
        "report_to", "loss_spike_threshold", "loss_spike_patience", "stall_minutes",
        "early_stopping_patience", "early_stopping_threshold", "max_hours", "max_train_tokens",
        "torch_compile",
    }
)  # fmt: skip
# Keys on which no weight depends: the same run goes on, whatever they are.
WATCH_KEYS = frozenset({"report_to", "stall_minutes"})


class Adapter(Section):
    """LoRA, with the field names of peft.LoraConfig.

    `target_modules` are names or ends of names, each of which has to match some layer, or
    "all-linear": all but the output head. `use_rslora` scales by alpha / sqrt(r) instead of
    alpha / r, which is more: lower lora_alpha or learning_rate. `use_dora` trains magnitudes too.
    Embedding rows of new control tokens are trained by themselves.
    """

    r: Count = 8
    lora_alpha: Count = 32
    lora_dropout: Fraction = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)]
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none"] = "none"

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Training(Section):
    """The subset of transformers.TrainingArguments that recipes set, with the same meaning.

    `neftune_noise_alpha` (5 is usual) adds noise to embeddings in training (arXiv 2310.05914).
    `torch_compile` compiles each block of the model, on NVIDIA GPUs with varlen attention.
    `load_best_model_at_end` keeps the checkpoint with the lowest validation loss besides the newest
    ones and gives `model/` its weights. `resume_from_checkpoint` starts from a checkpoint of
    another run (its folder, the run's folder or name); false starts anew although there is one.
    `early_stopping_*` are those of transformers.EarlyStoppingCallback. `max_hours` and
    `max_train_tokens` end training with a finished model. `loss_spike_threshold` stops it when the
    loss is above that many times its running median for `loss_spike_patience` steps in a row.
    `stall_minutes` ends a rank that makes no progress for so long; null waits forever.
    """

    learning_rate: Positive = 2.0e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    num_train_epochs: Annotated[float, Field(gt=0)] = 3
    max_steps: int = -1
    per_device_train_batch_size: Count = 1
    per_device_eval_batch_size: Count = 4
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    neftune_noise_alpha: Positive | None = None
    logging_steps: Count = 5
    eval_steps: Count = 50
    save_steps: Count = 50
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    load_best_model_at_end: bool = False
    resume_from_checkpoint: str | Literal[False] | None = None
    early_stopping_patience: Count | None = None
    early_stopping_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_hours: Positive | None = None
    max_train_tokens: Count | None = None
    loss_spike_threshold: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    loss_spike_patience: Count = 3
    stall_minutes: Positive | None = 30.0
    report_to: tuple[Literal["wandb", "tensorboard", "mlflow", "trackio"], ...] = ()
    seed: int = 42

    @field_validator("report_to", mode="before")
    @classmethod
    def _none_or_more(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _best_has_a_checkpoint(self) -> "Training":
        if self.load_best_model_at_end and self.save_steps % self.eval_steps:
            raise ValueError(
                f"load_best_model_at_end needs an evaluation at every checkpoint: save_steps "
                f"{self.save_steps} has to be a multiple of eval_steps {self.eval_steps}"
            )
        return self
