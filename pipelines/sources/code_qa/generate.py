"""Lets a model write questions and answers on the functions of a repository, within a budget.

`journal.jsonl` keeps every request and reply, `pairs.jsonl` is made of it at the end: the replies
on the functions as they are now, in their order. What was answered once is never asked again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.engine import Work
from pipelines.errors import SourceError
from pipelines.manifest import digest_of
from pipelines.records import Row, clean_text, read_rows
from pipelines.settings.sources import CodeQaSource, RepositorySource
from pipelines.sources import repository
from pipelines.sources.code_qa.chat import TIMEOUT, Chat, Completion, Refused
from pipelines.sources.code_qa.journal import Journal, Reply
from pipelines.sources.code_qa.pairs import fence
from pipelines.sources.fetch import fetch_source, raw_folder
from pipelines.sources.raw import FETCHED, Fetched
from pipelines.store import write_atomic

JOURNAL, PAIRS = "journal.jsonl", "pairs.jsonl"
REFUSALS_IN_A_ROW = 3
# A token has at least one byte; the chat's own tokens around the messages are no more than this.
FRAME_TOKENS = 64
LOOPBACK = ("localhost", "127.0.0.1", "::1")

SYSTEM = (
    "You write training data that tests the understanding of source code. You reply with JSON "
    "alone, without a code fence around it."
)
REQUEST = (
    "Write {count} different questions that a programmer could have about the code below, each "
    "with a correct and complete answer. Ask about what it does, why it does it that way, edge "
    "cases, errors and how to use it; each question must be answerable from this code alone. "
    'Reply with this JSON object: {{"pairs": [{{"question": "...", "answer": "..."}}]}}\n\n{code}'
)


class BudgetSpent(Exception):
    """The next request might exceed the budget."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about one function: its record, the messages, and the key of both."""

    function: Row
    messages: list[dict[str, str]]
    key: str
    reserved: int


def generate_problem(source: CodeQaSource) -> str | None:
    """Say in one sentence why pairs cannot be generated, or return None."""
    if source.code is None or source.endpoint is None or source.model is None:
        return (
            "nothing to read; name a local `path:` with rows of code, question and answer, or "
            "`code:` (a repository source), `endpoint:` and `model:` to have them written"
        )
    fetched = (raw_folder(source) / FETCHED).exists()
    return None if fetched else _request_problem(source, source.code)


def _request_problem(source: CodeQaSource, code: RepositorySource) -> str | None:
    """Say why the endpoint cannot be asked about the code, or return None."""
    if source.api_key_env and not os.environ.get(source.api_key_env):
        return f"api_key_env: the environment variable {source.api_key_env} is not set"
    parts = urlsplit(source.endpoint or "")
    if source.api_key_env and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        return "endpoint: a key is not sent over plain http; use https"
    problem = repository.find_problem(code)
    return f"code: {problem}" if problem else None


def generate(source: CodeQaSource, folder: Path) -> Fetched:
    """Ask about every function that has no reply yet, until all have one or the budget is spent.

    Raises SourceError where the endpoint cannot be used; what was answered is kept.
    """
    problem = generate_problem(source)
    if source.code is not None:
        problem = problem or _request_problem(source, source.code)
    if problem or source.code is None:
        raise SourceError(f"source {source.id!r}: {problem}")
    questions = [_ask_about(row, source) for row in _read_functions(source.code, folder)]
    if not questions:
        raise SourceError(f"source {source.id!r}: code: no definition with a docstring is there")
    with Journal(folder / JOURNAL) as journal:
        before = journal.spent.requests
        unasked = _ask_all(questions, source, journal)
        changed = _write_pairs(folder / PAIRS, questions, journal.replies, source)
        replies = [journal.replies[q.key] for q in questions if q.key in journal.replies]
        pairs = sum(len(reply.get("pairs", ())) for reply in replies)
        counts = {
            "functions": len(questions),
            "pairs": pairs,
            "bad_replies": sum("problem" in reply for reply in replies),
            "requests": journal.spent.requests - before,
            "requests_in_all": journal.spent.requests,
            "tokens_in_all": journal.spent.tokens,
            "functions_left": unasked,
        }
    left = f"; budget spent, {unasked} functions left" if unasked else ""
    summary = f"{pairs} pairs on {len(replies)} functions, {counts['requests']} new requests{left}"
    return Fetched(changed, summary, counts)


def _read_functions(code: RepositorySource, folder: Path) -> list[Row]:
    """Return the records of definitions, in order; the code is fetched first where it is remote."""
    fetch_source(code, refresh=True)
    raw = repository.locate(code)
    given = {
        "root": str(raw.root),
        "id": code.id,
        "where": "code",
        "license": code.license,
        "allow_unlicensed": code.allow_unlicensed,
        "openai_outputs": False,
        "origin": asdict(raw.origin),
        "max_bytes": code.max_file_bytes,
        "limit": None,
        "first": 0,
    }
    build = folder / "functions"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    try:
        made = repository.read(code, raw, Work(build), given)
        rows = [
            row
            for report in made.reports
            for row in read_rows(build / report.shard.file)
            if row["completion"] is not None
        ]
    finally:
        shutil.rmtree(build, ignore_errors=True)
    return rows[: code.max_records]


def _ask_about(function: Row, source: CodeQaSource) -> Question:
    text = REQUEST.format(
        count=source.questions_per_function, code=fence(str(function["completion"]), "python")
    )
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    sent = sum(len(message["content"].encode()) for message in messages)
    settings = source.model_dump(mode="json", include={"model", "temperature", "seed"})
    return Question(
        function,
        messages,
        digest_of([messages, settings])[:32],
        sent + FRAME_TOKENS + source.max_answer_tokens,
    )


def _ask_all(questions: list[Question], source: CodeQaSource, journal: Journal) -> int:
    """Ask what has no reply; return how many functions the budget leaves without one."""
    missing = {q.key: q for q in questions if q.key not in journal.replies}
    works = any(reply.get("problem") != "refused" for reply in journal.replies.values())
    held: list[tuple[str, Reply]] = []
    with _open_chat(source) as chat:
        for number, question in enumerate(missing.values()):
            try:
                reply = _ask(question, chat, source, journal)
            except BudgetSpent:
                return len(missing) - number + len(held)
            held.append((question.key, reply))
            works = works or reply.get("problem") != "refused"
            # A refusal is the code's fault only where the endpoint is known to work.
            if not works and len(held) in (REFUSALS_IN_A_ROW, len(missing)):
                raise SourceError(
                    f"source {source.id!r}: the endpoint refuses every request "
                    f"({reply['detail']}); check `model`, `max_answer_tokens` and `json_mode`"
                )
            while works and held:
                journal.keep(*held.pop(0))
    return 0


def _ask(question: Question, chat: Chat, source: CodeQaSource, journal: Journal) -> Reply:
    def may_send() -> None:
        spent = journal.spent
        tokens = spent.tokens + question.reserved
        if spent.requests >= source.max_requests or (
            source.max_tokens is not None and tokens > source.max_tokens
        ):
            raise BudgetSpent
        journal.begin(question.key, question.reserved)

    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        completion = chat.ask(question.messages, may_send)
    except Refused as error:
        return {"problem": "refused", "detail": str(error), "created": now}
    if completion.tokens is not None:
        journal.settle(question.key, question.reserved, completion.tokens)
    return {**read_reply(completion, source.questions_per_function), "created": now}


def read_reply(completion: Completion, most: int) -> Reply:
    """Return {pairs} of a reply that is exactly the JSON asked for, else {problem, detail}."""
    if completion.finish_reason == "length":
        return {"problem": "cut_off", "detail": "the reply reached max_answer_tokens"}
    try:
        reply = json.loads(completion.text)
    except (ValueError, RecursionError) as error:
        cause = str(error) if isinstance(error, ValueError) else "nested too deep"
        return {"problem": "not_json", "detail": f"{cause}: {completion.text[:100]!r}"}
    pairs = reply.get("pairs") if isinstance(reply, dict) else None
    if not isinstance(pairs, list) or not 1 <= len(pairs) <= most:
        return {"problem": "no_pairs", "detail": f"expected 'pairs', a list of 1 to {most}"}
    kept = []
    for pair in pairs:
        texts = [pair.get(key) for key in ("question", "answer")] if isinstance(pair, dict) else []
        if len(texts) != 2 or not all(isinstance(t, str) and _usable(t) for t in texts):
            return {"problem": "bad_pair", "detail": "a question or answer is no usable text"}
        kept.append(texts)
    return {"pairs": kept}


def _usable(text: str) -> bool:
    return bool(text.strip()) and clean_text(text) is not None


@contextmanager
def _open_chat(source: CodeQaSource) -> Iterator[Chat]:
    import httpx

    key = os.environ.get(source.api_key_env, "").strip() if source.api_key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    settings: dict[str, Any] = {
        "model": source.model,
        "temperature": source.temperature,
        "max_tokens": source.max_answer_tokens,
        **({"seed": source.seed} if source.seed is not None else {}),
        **({"response_format": {"type": "json_object"}} if source.json_mode else {}),
    }
    url = f"{(source.endpoint or '').rstrip('/')}/chat/completions"
    with httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=False) as client:
        yield Chat(client, url, settings)


def _write_pairs(
    path: Path, questions: list[Question], replies: dict[str, Reply], source: CodeQaSource
) -> bool:
    """Write the rows of the current functions; return whether they changed."""
    text = "".join(
        json.dumps(row, ensure_ascii=False) + "\n"
        for question in questions
        if question.key in replies
        for row in _make_rows(question, replies[question.key], source)
    )
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomic(path, text)
    return True


def _make_rows(question: Question, reply: Reply, source: CodeQaSource) -> Iterator[dict[str, Any]]:
    function = question.function
    common = {
        "generated": True,
        "model": source.model,
        "endpoint": urlsplit(source.endpoint or "").hostname,
        "prompt_digest": hashlib.sha256(json.dumps(question.messages).encode()).hexdigest()[:16],
        "created": reply["created"],
        **{key: function[key] for key in ("group", "url", "author", "license", "revision")},
    }
    if "problem" in reply:
        detail = f"{function['id']}: {reply['detail']}"
        yield {**common, "problem": reply["problem"], "detail": detail}
        return
    for number, (asked, answer) in enumerate(reply["pairs"]):
        yield {
            **common,
            "id": f"{function['id']}/{number}",
            "language": "python",
            "code": str(function["completion"]),
            "question": asked,
            "answer": answer,
        }
