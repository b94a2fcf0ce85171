"""A question with its answers becomes records, and every post of it is counted."""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from pipelines.engine import SAMPLES_PER_REASON, Params, Reject
from pipelines.manifest import canonical
from pipelines.records import Row, clean_text, new_record
from pipelines.sources.stack_exchange.licensing import SECONDS, combined_license, license_of
from pipelines.sources.stack_exchange.selections import (
    drop_reason,
    preference_score,
    rank_answers,
    select_answers,
    select_pairs,
)


@dataclass(slots=True)
class Tally:
    """What became of posts; `records` counts those made, `samples` holds rejects by reason."""

    used: int = 0
    records: int = 0
    unnamed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    samples: dict[str, list[Reject]] = field(default_factory=dict)

    def drop(self, reason: str, posts: int = 1) -> None:
        """Count posts that a selection left out."""
        if posts:
            self.dropped[reason] += posts

    def quarantine(self, name: str, reason: str, detail: str) -> None:
        """Count a post that cannot be used, and keep the first ones as samples."""
        self.quarantined[reason] += 1
        kept = self.samples.setdefault(reason, [])
        if len(kept) < SAMPLES_PER_REASON:
            kept.append({"id": name, "reason": reason, "detail": detail})

    def rejects(self) -> tuple[Reject, ...]:
        """Return the samples, reason by reason."""
        return tuple(reject for kept in self.samples.values() for reject in kept)


def read_thread(
    question: Row, answers: Sequence[Row], duplicates: Set[int], params: Params, tally: Tally
) -> list[Row]:
    """Return the records of a question and its answers (rows of POST_SCHEMA), best answer first.

    `params` holds the settings of the source, id, site, license, openai_outputs and limit (records
    left to make, or None).
    """
    reason = drop_reason(question, duplicates, params)
    if reason:
        tally.drop(reason, 1 + len(answers))
        return []
    thread = _Thread(question, params, tally)
    ranked = rank_answers(question, answers)
    chosen = select_answers(question, ranked, params)
    pairs: Sequence[tuple[Row, Row | None]]
    if params["pairs"]:
        pairs = select_pairs(question, chosen, ranked, params)
    else:
        pairs = [(answer, None) for answer in chosen]
    usable = [(better, worse) for better, worse in pairs if thread.is_usable(better, worse)]
    kept = usable[: params["limit"]]
    records = [thread.make_record(better, worse) for better, worse in kept]
    tally.records += len(records)
    used = {post["id"] for pair in kept for post in pair if post is not None}
    cut = {post["id"] for pair in usable for post in pair if post is not None} - used
    picked = {answer["id"] for answer in chosen}
    for answer in ranked:
        if answer["id"] in used:
            tally.used += 1
        elif answer["id"] in cut:
            tally.drop("max_records")
        elif answer["id"] not in thread.refused:
            refused = question["id"] in thread.refused
            reason = "question_unusable" if refused else _unused_reason(answer, picked, params)
            tally.drop(reason)
    _count_question(thread, bool(answers), bool(cut), tally)
    return records


def _unused_reason(answer: Row, picked: Set[int], params: Params) -> str:
    least = params["min_answer_score"]
    if least is not None and answer["score"] < least:
        return "answer_score"
    return "no_pair" if answer["id"] in picked else "not_selected"


def _count_question(thread: "_Thread", answered: bool, cut: bool, tally: Tally) -> None:
    if thread.made:
        tally.used += 1
    elif thread.question["id"] not in thread.refused:
        reason = "no_selected_answer" if answered else "unanswered"
        tally.drop("max_records" if cut else reason)


class _Thread:
    """The texts of one question and its answers, each converted once and only if it is needed."""

    def __init__(self, question: Row, params: Params, tally: Tally) -> None:
        self.question, self.params, self.tally = question, params, tally
        self.refused: set[int] = set()
        self.made = 0
        self._texts: dict[int, str | None] = {}

    def is_usable(self, answer: Row, worse: Row | None) -> bool:
        """Say whether every text of a record is there and clean; count those that are not."""
        posts = [self.question, answer, *([worse] if worse else [])]
        return all(self._text(post) is not None for post in posts)

    def _text(self, post: Row) -> str | None:
        if post["id"] not in self._texts:
            self._texts[post["id"]] = self._convert(post)
        return self._texts[post["id"]]

    def _convert(self, post: Row) -> str | None:
        from pipelines.sources.html_markdown import html_to_markdown

        body = html_to_markdown(post["body"]).strip()
        title = (post["title"] or "").strip() if post is self.question else ""
        text = clean_text("\n\n".join(part for part in (title, body) if part))
        if text:
            return text
        self.refused.add(post["id"])
        if text is None:
            name = f"{self.params['id']}:{post['id']}"
            self.tally.quarantine(name, "bad_characters", "NUL bytes or lone surrogates")
        else:
            self.tally.drop("empty_body")
        return None

    def make_record(self, answer: Row, worse: Row | None) -> Row:
        """Return the record of an answer, its counterpart in `meta.rejected` where there is one."""
        self.made += 1
        question, params = self.question, self.params
        source, site = params["id"], params["site"]
        license_ = self._license(answer)
        self.tally.licenses[license_] += 1
        self.tally.unnamed += answer["author"] is None
        about = {
            "site": site,
            "tags": question["tags"] or [],
            "accepted": answer["id"] == question["accepted"],
            "preference": self._preference(answer),
            "revised": _revised(answer),
            "author_url": self._author_url(answer),
            "question_id": question["id"],
            "question_score": question["score"],
            "question_url": self._link("questions", question["id"]),
            "question_author": question["author"],
            "question_author_url": self._author_url(question),
            "question_license": self._license(question),
            "question_revised": _revised(question),
            "combined_license": combined_license(self._license(question), license_),
            "rejected": self._describe(worse) if worse else None,
            "openai_outputs": True if params["openai_outputs"] else None,
        }
        return new_record(
            id=f"{source}:{answer['id']}" + (f">{worse['id']}" if worse else ""),
            group=f"{source}:q{question['id']}",
            source=source,
            revision=params["origin"]["revision"],
            url=self._link("a", answer["id"]),
            author=answer["author"],
            license=license_,
            created=_utc(answer["created"]),
            score=float(answer["score"]),
            prompt=self._text(question),
            completion=self._text(answer),
            meta=canonical({name: value for name, value in about.items() if value is not None}),
        )

    def _describe(self, worse: Row) -> Row:
        about = {
            "id": worse["id"],
            "text": self._text(worse),
            "score": worse["score"],
            "preference": self._preference(worse),
            "url": self._link("a", worse["id"]),
            "author": worse["author"],
            "author_url": self._author_url(worse),
            "license": self._license(worse),
        }
        return {name: value for name, value in about.items() if value is not None}

    def _preference(self, answer: Row) -> int:
        return preference_score(answer["score"], answer["id"] == self.question["accepted"])

    def _license(self, post: Row) -> str:
        default = self.params["license"]
        return license_of(post["license"], default, post["created"], post["edited"])

    def _author_url(self, post: Row) -> str | None:
        if post["author_id"] is None:
            return None
        return self._link("users", post["author_id"])

    def _link(self, kind: str, number: int) -> str:
        """Return the address of a page; relative to the site where nobody said which that is."""
        site = self.params["site"]
        return f"{f'https://{site}' if site else ''}/{kind}/{number}"


def _revised(post: Row) -> str:
    return _utc(max(post["created"], post["edited"] or ""))


def _utc(time: str) -> str:
    """Return a time of a dump or the API to the second, with its zone: both are UTC."""
    return f"{time[:SECONDS]}Z"
