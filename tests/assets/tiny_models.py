"""Base models of random weights in local folders, one of each architecture, with a tokenizer."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.assets.training_runs import BLOCK, write_tokenizer

SHAPES = {
    "gpt_bigcode": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": BLOCK},
    "starcoder2": {"intermediate_size": 128},
    "llama": {"intermediate_size": 64, "tie_word_embeddings": False},
    "qwen2": {"intermediate_size": 64, "tie_word_embeddings": True},
}
ROPE = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32,
    "max_position_embeddings": BLOCK,
}  # fmt: skip
NEW_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def tiny_config(model_type):
    """Return a config as a release has it: 300 ids in 384 rows (as Qwen2 has spare rows)."""
    shape = SHAPES[model_type] | ({} if model_type == "gpt_bigcode" else ROPE)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(model_type, vocab_size=384, **ids, **shape)


def write_base_model(folder, model_type):
    """Write a base model and its tokenizer; return the folder."""
    AutoModelForCausalLM.from_config(tiny_config(model_type)).save_pretrained(folder)
    return write_tokenizer(folder)


def write_chat_tokenizer(folder, base):
    """Write a base model's tokenizer with four control tokens more; return (folder, their ids)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": list(NEW_TOKENS)})
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.convert_tokens_to_ids(list(NEW_TOKENS))
