"""What the keys of other training scripts' configuration files mean in a recipe.

Names of transformers.TrainingArguments from 4.2x on, of bigcode's chat/train.py and finetune.py, of
the personal copilot's scripts and of the alignment handbook.
"""

from typing import Any

# Keys whose value is taken as it is, with the dotted key of the recipe where that is another one.
RENAMED = {
    "model_path": "model.model_name_or_path",
    "model_name_or_path": "model.model_name_or_path",
    "model_revision": "model.revision",
    "revision": "model.revision",
    "tokenizer_name": "tokenizer.name_or_path",
    "tokenizer_name_or_path": "tokenizer.name_or_path",
    "block_size": "tokenization.block_size",
    "max_seq_length": "tokenization.block_size",
    "max_seq_len": "tokenization.block_size",
    "max_length": "tokenization.block_size",
    "model_max_length": "tokenization.block_size",
    "seq_length": "tokenization.block_size",
    "fim_rate": "fim.fim_rate",
    "fim_spm_rate": "fim.fim_spm_rate",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "warmup_ratio": "training.warmup_steps",
    "num_warmup_steps": "training.warmup_steps",
    "lr": "training.learning_rate",
    "gr_acc_steps": "training.gradient_accumulation_steps",
    "log_freq": "training.logging_steps",
    "eval_freq": "training.eval_steps",
    "save_freq": "training.save_steps",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "lora_target_modules": "adapter.target_modules",
    "target_modules": "adapter.target_modules",
    "use_rslora": "adapter.use_rslora",
    "use_dora": "adapter.use_dora",
    "bnb_4bit_quant_type": "model.quantization_config.bnb_4bit_quant_type",
    "use_nested_quant": "model.quantization_config.bnb_4bit_use_double_quant",
    "use_bnb_nested_quant": "model.quantization_config.bnb_4bit_use_double_quant",
    "bnb_4bit_use_double_quant": "model.quantization_config.bnb_4bit_use_double_quant",
}

# What transformers takes for a key that is not given, where a recipe's own default is another.
UPSTREAM_DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
}

# Keys that decide nothing here, and why.
IGNORED = {
    "output_dir": "each run has a folder of its own, named by what decides its result",
    "overwrite_output_dir": "a finished run is never overwritten",
    "do_train": "a run always trains",
    "do_eval": "a run always evaluates, before the first step too",
    "eval_strategy": "the validation split is evaluated every eval_steps, at step 0 and at the end",
    "save_strategy": "checkpoints are saved every save_steps, the model always at the end",
    "logging_strategy": "metrics are logged every logging_steps",
    "logging_dir": "metrics are in the run's folder",
    "log_level": "the log is in the run's folder",
    "remove_unused_columns": "packed rows have no such columns",
    "preprocessing_num_workers": "the number of workers is set when a run is started",
    "num_workers": "the number of workers is set when a run is started",
    "dataloader_num_workers": "packed rows are memory-mapped",
    "overwrite_cache": "stages are kept by what they are made of",
    "streaming": "the data is packed once, then memory-mapped",
    "shuffle_buffer": "rows are shuffled over the whole split",
    "size_valid_set": "split.validation is a share",
    "validation_split_percentage": "split.validation is a share",
    "test_size": "split.test is a share",
    "subset": "see sources",
    "split": "see sources",
    "packing": "whole examples are always packed, and kept apart",
    "tf32": "float32 products are not used in training in bfloat16",
    "dataset_num_proc": "the number of workers is set when a run is started",
    "local_rank": "the launcher sets it",
    "use_auth_token": "the Hub's token comes from the environment",
    "trust_remote_code": "code of model repositories is never run",
    "bnb_4bit_compute_dtype": "it is model.dtype",
    "bnb_4bit_quant_storage": "quantized weights are not sharded",
    "lora_task_type": "it is CAUSAL_LM",
    "deepspeed": "DeepSpeed's file is generated from the recipe",
    "fsdp_config": "the strategy of the hardware file sets it",
    "fsdp_transformer_layer_cls_to_wrap": "the model's own block class is wrapped",
    "fsdp_min_num_params": "the model's own block class is wrapped",
    "no_fp16": "model.dtype decides",
    "eos_token_id": "control tokens are found by name, in the model's own tokenizer",
    "dataset_mixer": "name its sets as sources, each with its weight",
    "dataset_splits": "see sources",
    "dataset_configs": "see sources",
    "group_by_length": "rows are packed, all about as long",
    "auto_find_batch_size": "`starloom doctor` says what fits",
    "optim": "AdamW of torch is used",
    "adam_epsilon": "it is 1e-8",
    "gradient_checkpointing_kwargs": "checkpointing is the kind without reentrance",
    "ddp_find_unused_parameters": "it is false",
    "task_name": "it names nothing here",
    "chat_template": "set template.name: model for the model's own, or file",
    "use_flash_attn": "set model.attn_implementation",
    "use_flash_attention_2": "set model.attn_implementation",
    "resume_from_checkpoint": "a run resumes by itself",
    "report_to": "metrics.jsonl is always written; training.report_to sends it elsewhere too",
}
IGNORED_PREFIXES = {
    "hub_": "a model is pushed by a step of its own, after approval",
    "push_to_hub": "a model is pushed by a step of its own, after approval",
    "wandb_": "runs are not named by hand",
}

DIALOGUE_TEMPLATES = ("default", "no_system", "alpaca")

# Known datasets as sources. The hub's oasst1_en is gone: it is rebuilt from the message trees.
DATASETS: dict[str, dict[str, Any]] = {
    "HuggingFaceH4/oasst1_en": {
        "type": "oasst", "id": "oasst", "dataset": "OpenAssistant/oasst1",
        "license": "Apache-2.0", "mode": "all_paths",
    },
    "HuggingFaceH4/CodeAlpaca_20K": {
        "type": "code-alpaca", "id": "code-alpaca", "license": "CC-BY-NC-4.0",
        "input_separator": "\n\n",
    },
    "ArmelR/stack-exchange-instruction": {
        "type": "dataset", "id": "stack-exchange", "dataset": "ArmelR/stack-exchange-instruction",
        "files": ["data/finetune/*"], "license": "CC-BY-SA-4.0",
        "columns": {"prompt": "question", "completion": "response"},
    },
}  # fmt: skip
# What finetune.py reads: it writes "Question: ...", "Answer: ..." and trains all of it.
FINETUNE_PY = ("HuggingFaceH4/CodeAlpaca_20K", "ArmelR/stack-exchange-instruction")
COLUMNS = {
    "input_column_name": "prompt",
    "output_column_name": "completion",
    "data_column": "text",
    "dataset_text_field": "text",
}
DATASET_NOTES = {
    "HuggingFaceH4/oasst1_en": "was removed from the Hub; rebuilt from OpenAssistant/oasst1",
    "HuggingFaceH4/CodeAlpaca_20K": (
        "holds answers of an OpenAI model; to train on them set sources.0.allow_openai_outputs"
    ),
}

# Names of models by which an architecture is known.
KNOWN_MODELS = {
    "starcoder2": "starcoder2",
    "starcoder": "gpt_bigcode",
    "starchat-": "gpt_bigcode",
    "santacoder": "gpt_bigcode",
    "octocoder": "gpt_bigcode",
    "bigcode/large-model": "gpt_bigcode",
    "llama": "llama",
    "qwen2": "qwen2",
}
