"""Completes prompts with a run's model, through the same template that it was trained with.

Text never becomes a control token: only the template's own pieces are. What comes back is the
completion alone, without the token that ended it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, StoppingCriteria
from transformers.utils.logging import disable_progress_bar

from pipelines.errors import StarloomError
from pipelines.recipe import Recipe, load_hardware
from pipelines.records import clean_text, new_record
from pipelines.render.encode import control_ids, encode_prompt, load_tokenizer
from pipelines.render.pieces import content
from pipelines.render.templates import get_template
from pipelines.runs import Run
from pipelines.training.models import load_trained

# The last tokens among which a text that stops the model is looked for.
STOP_WINDOW = 32


class Completion(NamedTuple):
    """The new token ids without the one that ended them, and whether there was one."""

    ids: list[int]
    stopped: bool


def generate(
    run: Run,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
) -> str:
    """Return the completion of a prompt by the run's model; temperature 0 is greedy.

    `raw` sends the text as it is, without the template. Raises StarloomError where the run has no
    model yet, or the prompt is empty or fills the context.
    """
    if clean_text(prompt) is None:
        raise StarloomError(f"prompt {prompt!r}: not valid UTF-8 text")
    if not run.trained:
        raise StarloomError(
            f"run {run.name} has no model yet, its training is not finished: "
            f"`starloom run {run.info()['recipe']}` resumes it"
        )
    recipe = run.recipe()
    tokenizer = load_tokenizer(run.model)
    template = get_template(recipe.template, run.model)
    pieces = (
        content(prompt, trained=False)
        if raw
        else template.render_prompt(new_record(id="prompt", prompt=prompt))
    )
    disable_progress_bar()
    model = load_trained(run.model).to(pick_device(recipe))
    completion = complete(
        model,
        encode_prompt(tokenizer, pieces),
        stop=stop_ids(model, tokenizer, template.stop),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_texts=StopTexts(tokenizer, () if raw else template.stop_texts),
    )
    text = str(tokenizer.decode(completion.ids, skip_special_tokens=True))
    return text if raw else cut_at_stop(text, template.stop_texts)


def complete(
    model: Any,
    ids: Sequence[int],
    *,
    stop: Iterable[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_texts: "StopTexts | None" = None,
) -> Completion:
    """Return the model's continuation of token ids, until an id of `stop`, a text or the limit.

    The global random state is left as it was. Raises StarloomError for an empty prompt and for one
    that leaves no room in the context.
    """
    context = int(model.config.max_position_embeddings)
    if not 0 < len(ids) < context:
        raise StarloomError(
            f"the prompt has {len(ids)} tokens; expected 1 to {context - 1}, as the context of "
            f"the model is {context}"
        )
    # transformers' own defaults would narrow sampling to the 50 likeliest tokens.
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - len(ids)),
        eos_token_id=sorted(stop),
        pad_token_id=model.config.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    inputs = torch.tensor([list(ids)], device=model.device)
    gpu = [model.device] if model.device.type == "cuda" else []  # of several, the one that is used
    with torch.inference_mode(), torch.random.fork_rng(gpu):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            stopping_criteria=[stop_texts] if stop_texts and stop_texts.texts else None,
        )
    new = output[0, len(ids) :].tolist()
    stopped = bool(new) and new[-1] in settings.eos_token_id
    if stopped:
        return Completion(new[:-1], stopped)
    return Completion(new, stop_texts is not None and stop_texts.found(new))


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Stops a model that writes one of some texts, for templates whose turns end with text."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = tuple(texts)

    def found(self, ids: Sequence[int]) -> bool:
        """Return whether the new ids hold one of the texts."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return any(stop in text for stop in self.texts)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return which rows of the batch are finished."""
        done = [self.found(row[-STOP_WINDOW:].tolist()) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)


def cut_at_stop(text: str, stop_texts: Iterable[str]) -> str:
    """Return the completion up to the first text that ends it."""
    return text[: min((at for stop in stop_texts if (at := text.find(stop)) >= 0), default=None)]


def stop_ids(model: Any, tokenizer: Tokenizer, stop: str) -> set[int]:
    """Return the ids that end a completion: the template's own and the model's."""
    return {control_ids(tokenizer, [stop])[stop], int(model.config.eos_token_id)}


def pick_device(recipe: Recipe) -> str:
    """Return "cuda" where the recipe trains on GPUs and there is one here, else "cpu"."""
    wanted = load_hardware(recipe.hardware).device
    return "cuda" if wanted == "cuda" and torch.cuda.is_available() else "cpu"
