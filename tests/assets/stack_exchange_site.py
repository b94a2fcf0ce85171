"""A Stack Exchange API of our own making: a site of questions that change, and answers by script.

Shapes as recorded from the real API: wrapper of items, has_more, quota_max, quota_remaining and now
and then backoff; titles escaped for HTML; owners without an id for deleted users.
"""

import re
from urllib.parse import parse_qs, urlsplit

from tests.assets.replay_server import NOT_FOUND, Reply

START = 1_600_000_000
FILTER = "!nOedRLb*BA"


def owner(number=7, name="Ada &amp; Co"):
    return {
        "account_id": number,
        "reputation": 101,
        "user_id": number,
        "user_type": "registered",
        "display_name": name,
        "link": f"https://stats.stackexchange.com/users/{number}/ada",
    }


GONE_OWNER = {"user_type": "does_not_exist", "display_name": "user1234"}


def question(number, active=None, *, answers=(), **changes):
    """Return a question with answers [(id, text)] as the API gives it with our filter."""
    created = START + number * 1000
    active = created if active is None else active
    item = {
        "tags": ["regression", "c#"],
        "owner": owner(),
        "is_answered": bool(answers),
        "view_count": 12,
        "answer_count": len(answers),
        "score": number % 7,
        "last_activity_date": active,
        "creation_date": created,
        "question_id": number,
        "content_license": "CC BY-SA 4.0",
        "link": f"https://stats.stackexchange.com/questions/{number}/why",
        "title": f"Why isn&#39;t &quot;x&quot; &lt; {number}?",
        "body": f"<p>Question {number} &amp; more</p>\n",
    }
    if answers:
        item["answers"] = [
            {
                "owner": owner(8, "Bob"),
                "is_accepted": False,
                "score": 1,
                "last_activity_date": active,
                "creation_date": created + 10,
                "answer_id": each,
                "question_id": number,
                "content_license": "CC BY-SA 4.0",
                "body": f"<p>{text}</p>\n",
            }
            for each, text in answers
        ]
    return item | changes


class StackExchangeSite:
    """Answers like the API; `faults` maps the number of a request (from 0) to another Reply."""

    def __init__(self, questions=(), *, quota=10_000, gzip=False):
        self.questions = {each["question_id"]: each for each in questions}
        self.quota = quota
        self.gzip = gzip
        self.faults: dict[int, Reply] = {}
        self.extra: dict[int, dict] = {}  # what a wrapper says besides, by number of the request
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.times: list[float] = []
        self.clock = None

    def __call__(self, path, headers):
        parts = urlsplit(path)
        if not parts.path.startswith("/2.3/"):
            return NOT_FOUND
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        number = len(self.asked)
        self.asked.append((parts.path.removeprefix("/2.3"), query))
        if self.clock:
            self.times.append(self.clock.now())
        if number in self.faults:
            return self.faults[number]
        return self.answer(parts.path.removeprefix("/2.3"), query, number)

    def answer(self, path, query, number):
        self.quota -= 1
        more = False
        if path == "/filters/create":
            items = [{"filter_type": "safe", "included_fields": [], "filter": FILTER}]
        elif query.get("filter") != FILTER or query.get("site") != "stats.stackexchange.com":
            return refusal(400, "bad_parameter", "filter or site")
        elif found := re.fullmatch(r"/questions/([\d;]+)", path.replace("%3B", ";")):
            ids = [int(each) for each in found[1].split(";")]
            assert len(ids) <= 100
            items = [self.questions[each] for each in ids if each in self.questions]
        elif path == "/questions":
            items, more = self.page(query)
        else:
            return refusal(404, "no_method", f"this method does not exist: {path}")
        wrapper = {
            "items": items,
            "has_more": more,
            "quota_max": 10_000,
            "quota_remaining": self.quota,
        }
        return Reply.json(wrapper | self.extra.get(number, {}), gzip=self.gzip)

    def page(self, query):
        field, sign = {
            ("activity", "asc"): ("last_activity_date", 1),
            ("votes", "desc"): ("score", -1),
        }[query["sort"], query["order"]]
        low, high = int(query.get("min", 0)), int(query.get("max", 2**40))
        start = int(query.get("fromdate", 0))
        end = int(query.get("todate", 2**40))
        found = sorted(
            (
                each
                for each in self.questions.values()
                if low <= each[field] <= high
                and start <= each["creation_date"] <= end
                and query.get("tagged", each["tags"][0]) in each["tags"]
            ),
            key=lambda each: (sign * each[field], each["question_id"]),
        )
        size = int(query["pagesize"])
        first = (int(query["page"]) - 1) * size
        return found[first : first + size], len(found) > first + size


def refusal(number, name, message, **headers):
    """Return an error as the API words it: HTTP status 400 whatever the error."""
    reply = Reply.json(
        {"error_id": number, "error_name": name, "error_message": message}, status=400
    )
    reply.headers.update(headers)
    return reply


def throttled(seconds):
    return refusal(
        502,
        "throttle_violation",
        f"too many requests from this IP, more requests available in {seconds} seconds",
    )
