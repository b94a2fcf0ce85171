"""How a recipe trains: the adapter, and the subset of TrainingArguments that recipes set."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pipelines.section import Count, Fraction, Section


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
    """

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0e-5
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
    neftune_noise_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logging_steps: Count = 5
    eval_steps: Count = 50
    save_steps: Count = 50
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    seed: int = 42
