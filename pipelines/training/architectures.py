"""Configurations of models: from random weights for each architecture, and the dropout policy."""

from typing import Any

from pipelines.settings.model import ScratchConfig

DROPOUTS = (
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "hidden_dropout",
    "residual_dropout", "embedding_dropout",
)  # fmt: skip

# The layers an adapter can be added to, by model_type; the output head is none of them.
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LINEAR_LAYERS = {
    "gpt_bigcode": ("c_attn", "c_proj", "c_fc"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
}


def scratch_config(values: ScratchConfig, vocab_size: int, special_ids: dict[str, int]) -> Any:
    """Return the transformers config of a model from random weights, in StarCoder's proportions."""
    from transformers import AutoConfig

    if values.model_type == "gpt_bigcode":
        shape = values.model_dump(exclude={"model_type"})
    else:
        shape = {
            "num_hidden_layers": values.n_layer,
            "num_attention_heads": values.n_head,
            "num_key_value_heads": 1,
            "hidden_size": values.n_embd,
            "intermediate_size": 4 * values.n_embd,
            "max_position_embeddings": values.n_positions,
        }
    return AutoConfig.for_model(values.model_type, vocab_size=vocab_size, **special_ids, **shape)


def set_dropout(config: Any, rate: float | None) -> None:
    """Set every dropout rate of a config; None keeps what it carries (StarCoder's: 0.1)."""
    if rate is None:
        return
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, rate)
