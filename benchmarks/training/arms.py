"""The arms of `benchmarks.training.train`: each trains the same small model on the same documents.

    python -m benchmarks.training.arms ARM --prepared FILE --steps N --rounds N

The scripts of the seeds are written anew from what they do; none of their text is here. Their
model has starloom's shape, float32 and sdpa; starloom's defaults are varlen attention, a head loss
without all logits, and no dropout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.training.gate import Gate, Timed

BLOCK = 1024
END, PAD = "<|endoftext|>", "<fim_pad>"
SEQUENCES = 16  # of a buffer of ConstantLengthDataset; the seed's 1,024 would never be refilled
ORDERS = 200

# What torchrun gives its only rank.
ONE_RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip

Prepared = dict[str, Any]


def read_texts(prepared: Prepared) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(prepared["documents"])["text"].to_pylist()


def ordinary_order(prepared: Prepared, batch: int, batches: int) -> list[int]:
    """Return a random order whose first batches are padded about as much as all are.

    A few batches of random documents are 10 % off by chance; of some orders the nearest is taken.
    """
    import numpy as np
    import pyarrow.parquet as pq

    sizes = pq.read_table(prepared["documents"])["tokens"].to_numpy()
    usable = len(sizes) // batch * batch

    def share(order: np.ndarray) -> float:
        rows = sizes[order].reshape(-1, batch)
        return rows.sum() / (rows.max(1).sum() * batch)

    def draw(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).permutation(len(sizes))[:usable]

    whole = float(np.mean([share(draw(seed)) for seed in range(20)]))
    few = batch * batches
    best = min(range(ORDERS), key=lambda seed: abs(share(draw(seed)[:few]) - whole))
    return draw(best).tolist()


def open_tokenizer(prepared: Prepared) -> Any:
    from transformers import PreTrainedTokenizerFast

    file = str(Path(prepared["tokenizer"]) / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END, pad_token=PAD)


def small_model(prepared: Prepared, dropout: float = 0.1) -> Any:
    """Return the model of the run's recipe, as a script would build it.

    A script that says nothing of dropout trains with the 0.1 that StarCoder's configs carry.
    """
    import torch
    from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

    torch.manual_seed(42)
    return GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=prepared["rows"], n_layer=4, n_head=4, n_embd=128, n_positions=BLOCK,
            attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout, use_cache=False,
        )
    )  # fmt: skip


def script_arguments(**changes: Any) -> dict[str, Any]:
    """Return the TrainingArguments that all scripts share."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": 10_000, "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine", "warmup_steps": 100, "optim": "adamw_torch",
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "logging_steps": 10, "remove_unused_columns": False, **changes,
    }  # fmt: skip


def train_script(trainer_class: type, gate: Gate, pad: int, **options: Any) -> None:
    """Train with a Trainer class that measures itself."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step()

    class Measured(Timed, trainer_class):
        pass

    Measured.gate, Measured.pad_token = gate, pad
    Measured(callbacks=[Steps()], **options).train()


def run_padded(prepared: Prepared, gate: Gate) -> None:
    """Batches of 8 documents, each padded to the longest of its batch."""
    _run_padded(prepared, gate, batch=8, accumulation=1, padding="longest")


def run_padded_still(prepared: Prepared, gate: Gate) -> None:
    """Leave out the dropout: what remains of the difference is padding."""
    _run_padded(prepared, gate, batch=8, accumulation=1, padding="longest", dropout=0.0)


def run_padded_max(prepared: Prepared, gate: Gate) -> None:
    """Batches of 2 documents, each padded to a block; 4 batches a step."""
    _run_padded(prepared, gate, batch=2, accumulation=4, padding="max_length")


def _run_padded(
    prepared: Prepared,
    gate: Gate,
    *,
    batch: int,
    accumulation: int,
    padding: str,
    dropout: float = 0.1,
) -> None:
    """Train as Alpaca's and the copilot's scripts do: one sample at a time is tokenized, padded."""
    import torch
    from transformers import Trainer, TrainingArguments

    texts, tokenizer = read_texts(prepared), open_tokenizer(prepared)
    pad = tokenizer.pad_token_id
    order = ordinary_order(prepared, batch, (gate.rounds * gate.steps + gate.warmup) * accumulation)

    class Texts(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, index: int) -> Any:
            text = texts[order[index]] + END
            return tokenizer(text, truncation=True, max_length=BLOCK, return_tensors="pt")[
                "input_ids"
            ][0]

    def collate(samples: list[Any]) -> dict[str, Any]:
        ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=pad)
        if padding == "max_length":
            ids = torch.nn.functional.pad(ids, (0, BLOCK - ids.shape[1]), value=pad)
        labels = ids.masked_fill(ids == pad, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": ids.ne(pad)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Texts())

    train_script(
        InOrder, gate, pad, model=small_model(prepared, dropout), train_dataset=Texts(),
        data_collator=collate,
        args=TrainingArguments(
            **script_arguments(
                per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
            )
        ),
    )  # fmt: skip


def run_constant(prepared: Prepared, gate: Gate) -> None:
    """Endless blocks of a stream of documents, which see each other; a buffer's tail is dropped."""
    import torch
    from transformers import Trainer, TrainingArguments

    texts, tokenizer = read_texts(prepared), open_tokenizer(prepared)
    end = tokenizer.eos_token_id
    some = texts[:400]
    per_token = sum(map(len, some)) / sum(len(tokenizer(text)["input_ids"]) for text in some)

    class Blocks(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            source = iter(texts)
            while True:
                buffer: list[str] = []
                while sum(map(len, buffer)) < BLOCK * per_token * SEQUENCES:
                    text = next(source, None)
                    if text is None:
                        source = iter(texts)
                    else:
                        buffer.append(text)
                ids: list[int] = []
                for found in tokenizer(buffer)["input_ids"]:
                    ids.extend([*found, end])
                for first in range(0, len(ids), BLOCK):
                    block = ids[first : first + BLOCK]
                    if len(block) == BLOCK:
                        yield {"input_ids": torch.tensor(block), "labels": torch.tensor(block)}

    arguments = script_arguments(per_device_train_batch_size=3)
    train_script(
        Trainer, gate, -1, model=small_model(prepared), train_dataset=Blocks(),
        args=TrainingArguments(**arguments),
    )  # fmt: skip


def run_trl(prepared: Prepared, gate: Gate) -> None:
    """TRL's SFTTrainer, which tokenizes the texts, packs them best-fit and trains."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    tokenizer = open_tokenizer(prepared)
    arguments = script_arguments(
        max_length=BLOCK, packing=True, packing_strategy="bfd", per_device_train_batch_size=3,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    del arguments["remove_unused_columns"]
    train_script(
        SFTTrainer, gate, tokenizer.pad_token_id, model=small_model(prepared, 0.0),
        processing_class=tokenizer, args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_dict({"text": read_texts(prepared)}),
    )  # fmt: skip


def run_bare(prepared: Prepared, gate: Gate) -> None:
    """Run a loop of one's own over starloom's rows, model, loss and settings, and nothing else."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    from pipelines.runs import Run
    from pipelines.training.attention import is_flat, use_attention
    from pipelines.training.collate import Collator, PassedDataset
    from pipelines.training.head_loss import HeadLoss
    from pipelines.training.models import build_model, load_tokenizer

    recipe, folder = Run(Path(prepared["run"])).recipe(), Path(prepared["tokenizer"])
    settings = recipe.training
    model = build_model(recipe, folder).train()
    model.config.use_cache = False
    use_attention(model, recipe.model.attn_implementation)
    nats = HeadLoss(model, recipe.model.head_loss)
    pad = load_tokenizer(folder).pad_token_id
    rows = PassedDataset(Path(prepared["pack"]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, settings.adam_beta2),
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    schedule = get_cosine_schedule_with_warmup(optimizer, 48, settings.max_steps)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=settings.per_device_train_batch_size, shuffle=True,
        collate_fn=Collator(pad, flat=is_flat(model)), drop_last=True,
    )  # fmt: skip
    while True:
        batches = iter(loader)
        while True:
            began = time.process_time()
            batch = next(batches, None)
            gate.data += time.process_time() - began
            if batch is None:
                break
            gate.tokens += int((batch["input_ids"] != pad).sum())
            gate.positions += batch["input_ids"].numel()
            (nats(model, batch) / (batch["labels"] != -100).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            gate.step()


def run_starloom(prepared: Prepared, gate: Gate) -> None:
    """Run the training of `starloom run`: a rank's entry point, with a callback that measures."""
    from transformers import TrainerCallback

    from pipelines.runs import Run
    from pipelines.training import trainer
    from pipelines.training.models import load_tokenizer

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step()

    class Measured(Timed, trainer.PackedTrainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.add_callback(Steps())

    os.environ |= ONE_RANK
    tokenizer = Path(prepared["tokenizer"])
    Measured.gate, Measured.pad_token = gate, load_tokenizer(tokenizer).pad_token_id
    trainer.PackedTrainer = Measured
    run = Run(Path(prepared["run"]))
    run.checkpoints.mkdir(exist_ok=True)
    trainer.train(run, Path(prepared["pack"]), tokenizer)


ARMS: dict[str, Callable[[Prepared, Gate], None]] = {
    "padded": run_padded,
    "padded-still": run_padded_still,
    "padded-max": run_padded_max,
    "constant": run_constant,
    "trl": run_trl,
    "bare": run_bare,
    "starloom": run_starloom,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    options = parser.parse_args()
    gate = Gate(options.steps, options.rounds)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if options.arm == "trl":
        import trl  # noqa: F401
    gate.ready(imports=time.process_time())
    ARMS[options.arm](json.loads(options.prepared.read_text()), gate)
    sys.exit(f"{options.arm} ended before its last round")


if __name__ == "__main__":
    main()
