"""Stage `language`: keeps records whose prose is in one of the recipe's languages.

The language of prose is guessed by fastText's lid.176 model; code is never guessed at. Every
record is kept, kept without a guess (counted as exempt), or dropped with its reason; a dialogue is
judged message by message.
"""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.curate.fences import fenced_blocks
from pipelines.curate.language_model import Ranked, find_model, rank, rank_lines
from pipelines.curate.prose import strip_code
from pipelines.curate.redact_text import mask
from pipelines.curate.rows import Fault, choose_runner, sum_sources
from pipelines.curate.selection import write_kept
from pipelines.curate.turns import Turns, note_meta
from pipelines.engine import SAMPLES_PER_REASON, Built, Input, Job, Outcome, Params, Work
from pipelines.language_codes import can_spell, scripts_of
from pipelines.recipe import Recipe

DEPENDS = ("fasttext-wheel", "pyarrow")

# How much of a short text has to be in a script that no wanted language is written in.
FOREIGN_LETTERS = 4
FOREIGN_SHARE = 0.5
# How sure a guess at a short text has to be. Measured on the first words of real sentences: of 299
# Ukrainian ones 4 are lost, and 58 of 300 Russian ones taken for Ukrainian.
SHORT_SCORE = 0.9
# Scripts in which short texts are not guessed at: names, and characters that languages share.
UNGUESSED = frozenset({"LATIN", "CJK"})
# Texts are judged a batch at a time; guesses at texts that come again are remembered.
BATCH_ROWS = 1024
REMEMBERED_CHARS = 8_000_000


def params(recipe: Recipe) -> dict[str, Any]:
    """Return the wanted languages and from when on a guess counts."""
    curation = recipe.curation
    return {
        "languages": list(curation.languages),
        "threshold": curation.language_threshold,
        "margin": curation.language_margin,
        "min_letters": curation.language_min_letters,
    }


def build(recipe: Recipe, inputs: Mapping[str, Input], work: Work) -> Built:
    """Filter every shard; the report counts guesses, exempt records, cut messages and code tags."""
    given = {**params(recipe), "path": str(find_model()) if recipe.curation.languages else ""}
    upstream = inputs["collect"]
    jobs = [Job(shard.file, (path,)) for shard, path in upstream.paths()]
    made = work.map(filter_shard, jobs, given, runner=choose_runner(upstream.shards))
    totals: dict[str, Counter[str]] = {
        "languages": Counter(),
        "exempt": Counter(),
        "cut": Counter(),
        "code_languages": Counter(),
    }
    for shard in made:
        for name, total in totals.items():
            total.update(shard.extra[name])
    report = {name: dict(sorted(total.items())) for name, total in totals.items()}
    return Built(made, {**report, "sources": sum_sources(made)})


@dataclass(frozen=True, slots=True)
class _Guess:
    """The language of a text, and the fault that a filter finds with it."""

    language: str
    score: float
    fault: Fault | None
    by_model: bool = True


@dataclass(slots=True)
class _Shard:
    """The settings of a filter, and what it counts on the way."""

    languages: Sequence[str]
    threshold: float
    margin: float
    min_letters: int
    model: Path
    scripts: frozenset[str]
    found: Counter[str] = field(default_factory=Counter)
    exempt: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    code_languages: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    known: dict[str, _Guess | None] = field(default_factory=dict)
    known_chars: int = 0

    def guess(self, texts: Sequence[str]) -> list[_Guess | None]:
        """Return the guess at each text, None where it is too short to tell."""
        if self.known_chars > REMEMBERED_CHARS:
            self.known.clear()
            self.known_chars = 0
        new = dict.fromkeys(text for text in texts if text not in self.known)
        self.known_chars += sum(map(len, new))
        self.known.update(zip(new, _guess(list(map(strip_code, new)), self), strict=True))
        guesses = [self.known[text] for text in texts]
        self.found.update(guess.language for guess in guesses if guess and guess.by_model)
        return guesses


@dataclass(slots=True)
class _Judged:
    """A record's texts in order, and the guesses at them up to the first with a fault."""

    row: int
    texts: Sequence[str]
    is_dialogue: bool
    guesses: list[_Guess | None] = field(default_factory=list)
    fault: Fault | None = None


def filter_shard(inputs: Sequence[Path], output: Path, params: Params) -> Outcome:
    """Keep the rows whose prose is in `languages` with a score of at least `threshold`.

    A dialogue is judged message by message and ends before the first that is not. Kept rows with
    fenced code get the languages of its tags as `code_languages` in their meta.
    """
    languages = params["languages"]
    shard = _Shard(
        languages,
        params["threshold"],
        params["margin"],
        params["min_letters"],
        Path(params["path"]),
        frozenset().union(*map(scripts_of, languages)),
    )
    with pq.ParquetFile(inputs[0], page_checksum_verification=True) as file:
        table = file.read(use_threads=False)
    batches: list[pa.RecordBatch] = []
    drops: dict[int, Fault] = {}
    first = 0
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        noted, faults = _filter_batch(batch, shard)
        batches.append(noted)
        drops.update({first + row: _sample(fault, shard) for row, fault in faults.items()})
        first += batch.num_rows
    outcome = write_kept(pa.Table.from_batches(batches, table.schema), output, drops)
    extra = {
        "languages": shard.found,
        "exempt": shard.exempt,
        "cut": shard.cut,
        "code_languages": shard.code_languages,
    }
    counted = {name: dict(+count) for name, count in extra.items()}
    return replace(outcome, extra={**outcome.extra, **counted})


def _sample(fault: Fault, shard: _Shard) -> Fault:
    """Return a fault with its detail where it will be shown, without secrets."""
    reason, detail = fault
    shard.dropped[reason] += 1
    return reason, mask(detail) if shard.dropped[reason] <= SAMPLES_PER_REASON else ""


def _filter_batch(batch: pa.RecordBatch, shard: _Shard) -> tuple[pa.RecordBatch, dict[int, Fault]]:
    """Return the rows with what is noted of them and dialogues cut; {row: fault} of the bad."""
    turns = Turns(batch)
    faults: dict[int, Fault] = {}
    notes: dict[int, dict[str, Any]] = {}
    ends: dict[int, int] = {}
    for judged in _judge(turns, shard):
        end = _end_before(judged, turns, shard) if judged.fault and judged.is_dialogue else None
        if judged.fault and end is None:
            faults[judged.row] = judged.fault
            continue
        notes[judged.row] = _notes(judged, end, shard)
        if end is not None:
            ends[judged.row] = end
    for row, languages in _find_tags(turns, ends, faults).items():
        shard.code_languages.update(languages)
        notes.setdefault(row, {})["code_languages"] = languages
    return note_meta(turns.cut(ends), notes), faults


def _judge(turns: Turns, shard: _Shard) -> list[_Judged]:
    """Guess at the texts of all records, a message of each dialogue at a time.

    So what follows a message in another language costs nothing.
    """
    rows = len(turns.kinds)
    if not shard.languages:
        shard.exempt["any_language"] += rows
        return []
    shard.exempt["code"] += turns.kinds.count("text")
    every = [
        _Judged(row, turns.prose(row), kind == "messages")
        for row, kind in enumerate(turns.kinds)
        if kind != "text"
    ]
    number, left = 0, [judged for judged in every if judged.texts]
    while left:
        for judged, guess in zip(left, shard.guess([j.texts[number] for j in left]), strict=True):
            judged.fault = guess.fault if guess else None
            if judged.fault is None:
                judged.guesses.append(guess)
        number += 1
        left = [judged for judged in left if not judged.fault and len(judged.texts) > number]
    return every


def _end_before(judged: _Judged, turns: Turns, shard: _Shard) -> int | None:
    """Return after which message a dialogue ends that has a fault; None where nothing is left.

    What is left ends with an assistant's message that is trained, as a whole dialogue does.
    """
    answers = turns.answers(judged.row, len(judged.guesses))
    if judged.fault is None or not answers:
        return None
    end = answers[-1] + 1
    shard.cut[judged.fault[0]] += len(judged.texts) - end
    return end


def _notes(judged: _Judged, end: int | None, shard: _Shard) -> dict[str, Any]:
    """Return what is noted of a kept record: its first language, its lowest score.

    Of a dialogue the guess at each message, too, and how many were cut.
    """
    guesses = judged.guesses[:end]
    known = [guess for guess in guesses if guess]
    notes: dict[str, Any] = {}
    if known:
        lowest = min(guess.score for guess in known)
        notes = {"language": known[0].language, "language_score": lowest}
        if judged.is_dialogue:
            notes["language_scores"] = [g and [g.language, g.score] for g in guesses]
    elif end is None:
        shard.exempt["short"] += 1
    if end is not None:
        notes["language_cut"] = len(judged.texts) - end
    return notes


def _find_tags(
    turns: Turns, ends: Mapping[int, int], faults: Mapping[int, Fault]
) -> dict[int, list[str]]:
    """Return the languages that kept records' fenced code blocks are tagged with, in order."""
    found = {}
    for row, texts in turns.fenced(ends):
        tags = [block.language for text in texts for block in fenced_blocks(text)]
        languages = list(dict.fromkeys(filter(None, tags)))
        if languages and row not in faults:
            found[row] = languages
    return found


def _guess(proses: Sequence[str], shard: _Shard) -> list[_Guess | None]:
    """Return the language of each prose, or None where it is too short to tell.

    Of a short text the script is judged: most short docstrings are names and verbs, and a guess at
    them a coin flip, but "Спасибо!" is not English. See `_decide_short` for shared scripts.
    """
    is_long = [_has_letters(prose, shard.min_letters) for prose in proses]
    lines = list(itertools.compress(proses, is_long))
    ranked = iter(rank_lines(lines, shard.model, 2 if shard.margin else 1))
    return [
        _decide(prose, next(ranked), shard) if long else _decide_short(prose, shard)
        for prose, long in zip(proses, is_long, strict=True)
    ]


def _decide_short(prose: str, shard: _Shard) -> _Guess | None:
    """Return the guess at a text that is in another script, or surely in another language of one.

    A guess is sure from SHORT_SCORE on, or where no wanted language has all of the text's letters.
    """
    script = foreign_script(prose, shard.scripts)
    if script is not None:
        return _Guess(script, 1.0, (f"script:{script}", f"{script}: {prose}"), by_model=False)
    if prose.isascii() or shard.scripts <= UNGUESSED:
        return None
    [(language, score)] = rank(prose, shard.model, 1)
    shared = scripts_of(language) - UNGUESSED
    rivals = [wanted for wanted in shard.languages if scripts_of(wanted) & shared]
    if language in shard.languages or not rivals or not can_spell(language, prose):
        return None
    if score < SHORT_SCORE and any(can_spell(rival, prose) for rival in rivals):
        return None
    fault = (f"language:{language}", f"{language} {score:.2f}: {prose}")
    return _Guess(language, round(score, 3), fault)


def _decide(prose: str, ranked: Ranked, shard: _Shard) -> _Guess:
    language, score = ranked[0]
    rival = max((other for name, other in ranked[1:] if name not in shard.languages), default=0.0)
    fault = None
    if score < shard.threshold or score - rival < shard.margin:
        fault = ("language_uncertain", f"{language} {score:.2f}: {prose}")
    elif language not in shard.languages:
        fault = (f"language:{language}", f"{language} {score:.2f}: {prose}")
    return _Guess(language, round(score, 3), fault)


def _has_letters(prose: str, count: int) -> bool:
    """Say whether a text has that many letters; most show it at their beginning."""
    head = sum(map(str.isalpha, prose[: 2 * count]))
    return head >= count or head + sum(map(str.isalpha, prose[2 * count :])) >= count


def foreign_script(prose: str, scripts: frozenset[str]) -> str | None:
    """Return the script of most letters of a text, lower case, where it is none of the given.

    Single letters in between, as the Greek ones of mathematics, do not count.

    >>> foreign_script("Спасибо!", frozenset({"LATIN"}))
    'cyrillic'
    >>> foreign_script("the angle φ", frozenset({"LATIN"})) is None
    True
    """
    if prose.isascii():
        return None  # names and commands, in texts of any language
    found = Counter(
        unicodedata.name(letter, "?").split(maxsplit=1)[0] for letter in filter(str.isalpha, prose)
    )
    foreign = {script: count for script, count in found.items() if script not in scripts}
    if not foreign or sum(foreign.values()) < max(FOREIGN_LETTERS, FOREIGN_SHARE * found.total()):
        return None
    return max(foreign, key=lambda script: (foreign[script], script)).lower()
