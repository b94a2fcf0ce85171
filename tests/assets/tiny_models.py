"""Base models of random weights in local folders, one of each architecture, with a tokenizer."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.assets.training_runs import BLOCK, write_tokenizer

SHAPES = {
    "gpt_bigcode": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": BLOCK},
    "starcoder2": {"intermediate_size": 128},
    "llama": {"intermediate_size": 64, "tie_word_embeddings": False},
    "qwen2": {"intermediate_size": 64, "tie_word_embeddings": True},
}
KINDS = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
ROPE = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32,
    "max_position_embeddings": BLOCK,
}  # fmt: skip
NEW_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def tiny_config(model_type, tied=None):
    """Return a config as a release has it: 300 ids in 384 rows (as Qwen2 has spare rows)."""
    shape = SHAPES[model_type] | ({} if model_type == "gpt_bigcode" else ROPE)
    shape |= {} if tied is None else {"tie_word_embeddings": tied}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return AutoConfig.for_model(model_type, vocab_size=384, **ids, **shape)


def write_base_model(folder, model_type, tied=None):
    """Write a base model, the same one each time, and its tokenizer; return the folder."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config(model_type, tied)).save_pretrained(folder)
    return write_tokenizer(folder)


def write_chat_tokenizer(folder, base):
    """Write a base model's tokenizer with four control tokens more; return (folder, their ids)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": list(NEW_TOKENS)})
    tokenizer.save_pretrained(folder)
    return folder, tokenizer.convert_tokens_to_ids(list(NEW_TOKENS))


CODER_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>",
)  # fmt: skip
CODER_POSITIONS = 1024
CODER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_coder_model(folder, model_type, texts):
    """Write a base of random weights as current coders come: ChatML and FIM tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(CODER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(CODER_TOKENS[3:]),
        chat_template=CODER_TEMPLATE,
    ).save_pretrained(folder)
    width = {"n_embd": 64, "n_positions": CODER_POSITIONS}
    if model_type != "gpt_bigcode":
        width = {"hidden_size": 64, "max_position_embeddings": CODER_POSITIONS}
    shape = SHAPES[model_type] | ({} if model_type == "gpt_bigcode" else ROPE) | width
    config = AutoConfig.for_model(
        model_type, vocab_size=2048, bos_token_id=0, eos_token_id=2, pad_token_id=0, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def check_merged(base, folder, kind):
    """Train an adapter with new tokens on a base by hand; check all forms in which it is saved.

    The merged model, and the base with the adapter as peft loads it, give the logits that the
    trained model gave (fp32, 1e-5).
    """
    import torch
    from peft import AutoPeftModelForCausalLM

    from pipelines.training.models import build_model, load_trained, save_trained
    from tests.assets.training_runs import make_recipe

    tokenizer, new_ids = write_chat_tokenizer(folder / "chat", base)
    recipe = make_recipe(
        model={"model_name_or_path": str(base), "dtype": "float32", "attn_implementation": "sdpa"},
        adapter={"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **KINDS[kind]},
    )
    model = build_model(recipe, tokenizer).eval()
    ids = torch.tensor([[5, 6, *new_ids, 7]])
    # Steps that move the logits, and leave them near 1, where float32 has 1e-5 to spare.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.config.use_cache = False

    save_trained(model, folder / "model", tokenizer, "float32")

    merged = load_trained(folder / "model")
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "model" / "adapter").eval()
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids[:, :2]).logits
        assert (untrained - expected[:, :2, : untrained.shape[-1]]).abs().max() > 1e-3
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)
        rows = new_ids[-1] + 1
        found = adapted(input_ids=ids).logits[..., :rows]
        assert torch.allclose(found, expected[..., :rows], atol=1e-5)
    assert merged.config.use_cache
    same = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert same == AutoConfig.from_pretrained(base).tie_word_embeddings
