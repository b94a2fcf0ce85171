"""The recipe's section `preference`: the optional stage that prefers the better of two answers."""

from typing import Annotated, Literal

from pydantic import Field

from pipelines.settings.section import Count, Fraction, Section
from pipelines.settings.training import Adapter


class Preference(Section):
    """Direct preference optimisation, with the names of trl.DPOConfig and peft.LoraConfig.

    Pairs come from the records themselves: a source with `pairs: true` keeps worse answers
    (OpenAssistant by rank, Stack Exchange by score). An adapter is trained on the run's model; with
    it switched off, that is the reference. Pairs longer than tokenization.block_size are left out.
    """

    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0e-6
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    adam_beta2: Fraction = 0.999
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: int = -1
    per_device_train_batch_size: Count = 2
    gradient_accumulation_steps: Count = 8
    gradient_checkpointing: bool = False
    seed: int = 42
    adapter: Adapter = Adapter(target_modules=("all-linear",))
