"""The base model of a recipe: where its weights come from, and in which precision."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from pipelines.settings.section import Count, Fraction, Section

_MIXES = (
    "it mixes packed documents on gpt_bigcode, and on every model in batches of several rows; "
    "varlen runs the same kernel with explicit boundaries, without the flash-attn package"
)
UNSAFE_ATTENTION = {
    "flash_attention_2": _MIXES,
    "flash_attention_3": _MIXES,
    "flash_attention_4": _MIXES,
    "flex_attention": "gpt_bigcode does not support it, and it does not train on a CPU; use auto",
}


class ScratchConfig(Section):
    """A model built from random weights, its sizes named as in GPTBigCodeConfig.

    Whatever its `model_type`, it has StarCoder's shape: one key/value head for all query heads and
    an inner width of 4 x n_embd.
    """

    model_type: Literal["gpt_bigcode", "starcoder2", "llama", "qwen2"] = "gpt_bigcode"
    n_layer: Count = 4
    n_head: Count = 4
    n_embd: Count = 256
    n_positions: Count = 512


class Quantization(Section):
    """A frozen base in 4 or 8 bit, with the field names of transformers.BitsAndBytesConfig.

    It computes in model.dtype. Needs the extra `starloom[bitsandbytes]` and an adapter, for only
    that is trained. Runs on NVIDIA GPUs, and slowly on the CPU.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True

    @model_validator(mode="after")
    def _one_width(self) -> "Quantization":
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set either load_in_4bit or load_in_8bit to true")
        return self


class Model(Section):
    """The base model: a hub id or folder with its revision, or `config` for random weights.

    `dropout` replaces every rate in the model's config (StarCoder's carry 0.1); null keeps them.
    `quantization_config` is for adapters (QLoRA). `attn_implementation` auto takes the fastest that
    keeps packed documents apart: varlen, sdpa or eager. `head_loss` says how the loss is computed
    from the last hidden states: fused (torch >= 2.13) or in chunks, or from all logits (dense).
    """

    model_name_or_path: str | None = None
    revision: str | None = None
    config: ScratchConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    dropout: Fraction | None = 0.0
    quantization_config: Quantization | None = None
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager"] = "auto"
    head_loss: Literal["auto", "fused", "chunked", "dense"] = "auto"

    @field_validator("attn_implementation", mode="before")
    @classmethod
    def _safe_attention(cls, value: Any) -> Any:
        if value in UNSAFE_ATTENTION:
            raise ValueError(f"{value} is not offered: {UNSAFE_ATTENTION[value]}")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> "Model":
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("give either model_name_or_path or config")
        if self.config is not None and self.quantization_config is not None:
            raise ValueError("quantization_config is for a base model, not for random weights")
        return self
