"""The `tokenizer` stage: a tokenizer folder that holds every control token the recipe renders.

Either a byte-level BPE trained on the train split, with StarCoder's special tokens in their order,
or the model's own tokenizer. Invariant: `<|endoftext|>` ends texts, `<fim_pad>` or the family's own
token pads, never the same one, and every control token is special, so that no text encodes to it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipelines.engine import Built, Input, Job, Outcome, Params, Work
from pipelines.errors import PreflightError, TemplateError
from pipelines.hub_access import hub_errors
from pipelines.manifest import Counts, digest_of, sha256_file
from pipelines.recipe import Recipe
from pipelines.records import body_text, read_rows
from pipelines.render.encode import control_ids, load_tokenizer
from pipelines.render.fim import MIDDLE, PREFIX, SUFFIX, is_permuted
from pipelines.render.pieces import END_OF_TEXT, PAD
from pipelines.render.sentinels import find_sentinels
from pipelines.render.templates import (
    added_tokens,
    answer_end,
    exported_template,
    get_template,
    read_chat_template,
    read_special_names,
)

DEPENDS = ("tokenizers",)


class UnfetchedTokenizer(PreflightError):
    """A tokenizer of the Hub that is not on this machine and cannot be fetched."""


# Their order is that of StarCoder's ids 0 to 18.
STARCODER_TOKENS = (
    END_OF_TEXT,
    PREFIX,
    MIDDLE,
    SUFFIX,
    PAD,
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<empty_output>",
    "<commit_before>",
    "<commit_msg>",
    "<commit_after>",
    "<reponame>",
)
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATE_FILE = "chat_template.jinja"
# What pads in other families, where it is there already: a new token would need a row.
PADS = (PAD, "<|fim_pad|>", "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
SPECIAL_TOKENS_MAP = {
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "unk_token": END_OF_TEXT,
    "pad_token": PAD,
}


def params(recipe: Recipe) -> dict[str, Any]:
    """Return what the tokenizer is made of; a local folder counts by its content, not its path.

    Raises PreflightError where the folder has no tokenizer.json, TemplateError where the recipe
    wants the chat template of a tokenizer that has none.
    """
    needed: dict[str, Any] = {"added": list(_added(recipe))}
    needed["sentinels"] = _fim_form(recipe)
    is_own = recipe.template.name == "model"
    needed["chat_template"] = None if is_own else exported_template(recipe.template)
    # What ends an answer; a Jinja template's is known once it has met the tokenizer, in `build`.
    needed["end_of_answer"] = (
        None if recipe.template.is_jinja else get_template(recipe.template).stop
    )
    if recipe.tokenizer.train_vocab_size:
        if is_own:
            raise TemplateError(
                "template.name: a tokenizer that is trained here has no chat template of its own; "
                "name one"
            )
        return {"train_vocab_size": recipe.tokenizer.train_vocab_size, **needed}
    name, revision = _origin(recipe)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if is_own:
            needed["chat_template"] = _own_template(recipe)
        needed["names"] = _own_names(recipe)
        return {"content": digest_of(sha256_file(_tokenizer_file(folder))), **needed}
    return {"name_or_path": name, "revision": revision, **needed}


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Train or fetch the tokenizer, add what the template needs, write the three files."""
    arguments = params(recipe)
    if arguments["chat_template"] is None:
        arguments["chat_template"] = _own_template(recipe)
    own: dict[str, str] = {}
    if recipe.tokenizer.train_vocab_size:
        corpus = tuple(path for _, path in inputs["split"].paths("train"))
        first = work.one(write_trained, Job(FILES[0], corpus), arguments)
    else:
        path = _fetch(*_origin(recipe))
        first = work.one(write_given, Job(FILES[0], (path,)), arguments)
        own = _own_names(recipe)
    tokenizer = load_tokenizer(work.path)
    pad = _find_pad(tokenizer)
    arguments["names"] = {**SPECIAL_TOKENS_MAP, **own, "pad_token": pad}
    if arguments["end_of_answer"] is None:
        arguments["end_of_answer"] = answer_end(
            recipe.template, work.path, arguments["chat_template"], arguments["names"]
        )
    rest = (
        work.one(write_config, Job(FILES[1], ()), arguments),
        work.one(write_special_tokens_map, Job(FILES[2], ()), arguments),
    )
    form = arguments["sentinels"]
    sentinels = find_sentinels(tokenizer, form) if form else ()
    names = dict.fromkeys((END_OF_TEXT, pad, *sentinels, *arguments["added"]))
    report = {
        "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True),
        "trained": bool(recipe.tokenizer.train_vocab_size),
        "control_ids": control_ids(tokenizer, names),
    }
    return Built((first, *rest), report)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE as StarCoder's: single digits, then GPT-2's pattern, no prefix blank.

    The result depends on the texts alone, not on the number of threads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(STARCODER_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_trained(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Train on the bodies of the records in the input shards."""
    tokenizer = train_tokenizer(_bodies(inputs), params["train_vocab_size"])
    return _write_tokenizer(tokenizer, output, params)


def write_given(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Take the tokenizer in the folder of the one input."""
    return _write_tokenizer(load_tokenizer(inputs[0].parent), output, params)


def write_config(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write what transformers needs to load tokenizer.json as it is."""
    config = {
        # Another class would rebuild the pre-tokenizer by its own rules and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **params["names"],
        # Here every version of transformers and every server looks for it.
        "chat_template": params["chat_template"],
        # Training puts it into generation_config, so that servers end answers there.
        "end_of_answer": params["end_of_answer"],
        "end_of_text": END_OF_TEXT,
    }
    return _write_json(config, output)


def write_special_tokens_map(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Write the file that tools other than transformers 5 read."""
    return _write_json(params["names"], output)


def _bodies(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        for row in read_rows(path, ["messages", "prompt", "completion", "text"]):
            yield body_text(row)


def _write_tokenizer(tokenizer: Tokenizer, output: Path, params: Params) -> Outcome:
    form = params["sentinels"]
    sentinels = find_sentinels(tokenizer, form) if form else ()
    # A token that is there already keeps its id, and becomes special if it was not. Tokenizers of
    # other families lack StarCoder's end or pad token: as new ones they get rows that are trained.
    required = (END_OF_TEXT, _find_pad(tokenizer))
    tokenizer.add_special_tokens([*required, *sentinels, *params["added"]])
    tokenizer.save(str(output))
    return Outcome(Counts())


def _write_json(value: Mapping[str, Any], output: Path) -> Outcome:
    output.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return Outcome(Counts())


def _added(recipe: Recipe) -> tuple[str, ...]:
    tokens = added_tokens(recipe.template)
    return tuple(name for name in tokens if name not in STARCODER_TOKENS)


def _find_pad(tokenizer: Tokenizer) -> str:
    """Return the token that pads: the first that the tokenizer has, or else StarCoder's."""
    return next((name for name in PADS if tokenizer.token_to_id(name) is not None), PAD)


def _own_names(recipe: Recipe) -> dict[str, str]:
    """Return what a Jinja template means by `bos_token` and `eos_token`: the given tokenizer's."""
    if not recipe.template.is_jinja:
        return {}
    name, revision = _origin(recipe)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub.errors import EntryNotFoundError

        try:
            folder = _fetch(name, revision, FILES[1]).parent
        except EntryNotFoundError:
            return {}
    return read_special_names(folder)


def _fim_form(recipe: Recipe) -> str | None:
    """Return whose sentinels the recipe renders, by `fim.sentinels`; None where it renders none."""
    return recipe.fim.sentinels if is_permuted(recipe.fim) else None


def _origin(recipe: Recipe) -> tuple[str, str | None]:
    """Return the tokenizer's name or path, and the revision pinned for the model it belongs to."""
    model = recipe.model
    name = recipe.tokenizer.name_or_path or model.model_name_or_path
    assert name is not None, "the recipe's validator asks for one of them"
    return name, model.revision if name == model.model_name_or_path else None


def _own_template(recipe: Recipe) -> str:
    """Return the chat template that comes with the given tokenizer."""
    name, revision = _origin(recipe)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub.errors import EntryNotFoundError

        for file in (FILES[1], CHAT_TEMPLATE_FILE):
            try:
                folder = _fetch(name, revision, file).parent
            except EntryNotFoundError:
                continue
            if read_chat_template(folder) is not None:
                break
    found = read_chat_template(folder)
    if found is None:
        raise TemplateError(
            f"template.name: model, but the tokenizer {name!r} has no chat template; name one, "
            "or give your own with template.name: file"
        )
    return found


def _tokenizer_file(folder: Path) -> Path:
    path = folder / FILES[0]
    if not path.is_file():
        raise PreflightError(
            f"{folder}: no tokenizer.json there; write it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return path


def _fetch(name: str, revision: str | None, file: str = FILES[0]) -> Path:
    """Return the path of a file, local or from the Hub (from its cache when offline).

    Raises PreflightError where the tokenizer cannot be fetched, EntryNotFoundError where it is
    there, without this file.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _tokenizer_file(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise PreflightError(f"tokenizer {name!r}: no such folder, and not a Hub id (OWNER/NAME)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except hub_errors() as error:
        if (
            file != FILES[0]
            and isinstance(error, EntryNotFoundError)
            and not isinstance(error, LocalEntryNotFoundError)
        ):
            raise
        raise UnfetchedTokenizer(
            f"tokenizer {name!r} at revision {revision or 'main'!r} cannot be fetched "
            f"({type(error).__name__}); accept its license at https://huggingface.co/{name} and "
            "run `hf auth login`, or set tokenizer.name_or_path to a local folder"
        ) from error
