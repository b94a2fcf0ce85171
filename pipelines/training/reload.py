"""Loads a saved model as its users will, in a process of its own, and lets it write some tokens.

`python -m pipelines.training.reload FOLDER DEVICE` prints what it found as one line of JSON. It
takes nothing of the run but the folder: the tokenizer with its chat template, the weights and the
generation settings have to be enough.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pipelines.errors import StarloomError, StoreError, TrainingError
from pipelines.manifest import sha256_file
from pipelines.runs import Run
from pipelines.training.environment import hardware_of
from pipelines.training.separate import ERROR, run_separately

RESULT, LOG = "reload.json", "reload.log"
MODULE = "pipelines.training.reload"
QUESTION = "Return the sum of two numbers."
NEW_TOKENS = 8


def check_saved(run: Run) -> dict[str, Any]:
    """Return what a trained run's model does in a fresh process; once for each training.

    Raises TrainingError where it cannot be loaded or used; its files are left as they are.
    """
    key = sha256_file(run.path / "training.json")
    found = run.read(RESULT)
    if found and found["training"] == key:
        return found
    found = {"training": key, **reload_folder(run, run.model)}
    run.write(RESULT, found)
    return found


def reload_summary(found: dict[str, Any]) -> str:
    """Return what a fresh process has made of a saved model, in a few words."""
    return (
        f"loaded in a fresh process, wrote {len(found['ids'])} tokens, stops at ids "
        + ", ".join(map(str, found["stop_ids"]))
    )


def reload_folder(run: Run, folder: Path) -> dict[str, Any]:
    """Return what `try_model` finds in a fresh process; raises TrainingError as `check_saved`."""
    hardware, log = hardware_of(run), run.path / LOG
    try:
        run_separately(
            "loading it",
            MODULE,
            [str(folder), hardware.device],
            log=log,
            recipe=run.recipe(),
            hardware=hardware,
        )
    except StarloomError as error:
        raise TrainingError(
            f"run {run.name}: the saved model cannot be used: {error} (its files are left in "
            f"{folder}, the checkpoints in {run.checkpoints})"
        ) from error
    found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").strip().split("\n")[-1])
    return found


def try_model(folder: Path, device: str) -> dict[str, Any]:
    """Load a folder with transformers alone, complete a prompt, and return prompt and tokens.

    Raises StoreError where it does not load, TrainingError for what makes it unusable: too few
    rows for its tokenizer, numbers that are not finite, an end of answers that is no stop token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    except Exception as error:  # whatever a library says of a broken file
        raise StoreError(f"it does not load ({type(error).__name__}: {error})") from error
    if device == "cuda" and torch.cuda.is_available():
        model = model.to("cuda")
    _check_settings(model, tokenizer)
    room = int(model.config.max_position_embeddings) - NEW_TOKENS
    prompt = _write_prompt(tokenizer)[-room:]
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        if not torch.isfinite(logits).all():
            raise TrainingError("its logits are not finite; train with a lower learning_rate")
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    new = output[0, len(prompt) :].tolist()
    return {
        "prompt": tokenizer.decode(prompt),
        "ids": new,
        "text": tokenizer.decode(new),
        "stop_ids": _stops(model),
    }


def _check_settings(model: Any, tokenizer: Any) -> None:
    rows, needed = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if rows <= needed:
        raise TrainingError(f"it has {rows} embedding rows, its tokenizer ids up to {needed}")
    wanted = {tokenizer.eos_token_id}
    end = tokenizer.init_kwargs.get("end_of_answer")
    if end is not None:
        wanted.add(tokenizer.convert_tokens_to_ids(end))
    if not wanted <= set(_stops(model)):
        raise TrainingError(
            f"generation_config.json stops at {_stops(model)}, its answers end with "
            f"{sorted(wanted)}"
        )
    if not model.config.use_cache:
        raise TrainingError("config.json has use_cache: false, so that generating is slow")


def _stops(model: Any) -> list[int]:
    stops = model.generation_config.eos_token_id
    return [stops] if isinstance(stops, int) else list(stops or ())


def _write_prompt(tokenizer: Any) -> list[int]:
    """Return the ids of a question in the chat template, or as plain text without one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def main() -> int:
    """Try the folder named on the command line; what is wrong with it ends in one line."""
    folder, device = sys.argv[1:]
    try:
        found = try_model(Path(folder), device)
    except StarloomError as error:
        sys.stderr.write(f"{ERROR}{' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(f"{json.dumps(found, ensure_ascii=False)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
