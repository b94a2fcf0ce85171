"""What torchrun and its ranks wrote to a run's log: who was killed, and what failed first."""

import re
import textwrap

TAIL_LINES = 15
# torchrun's report: what a signal ended (its own SIGTERM to the others apart), what it killed
# itself because it did not end, where its own log begins after that of the ranks, the errors of the
# ranks, and which failed first: the others' are often those of a lost connection to it.
KILLED = re.compile(r"exitcode\s*: -(?!15\b)\d+ \(pid: (\d+)\)")
KILLED_BY_TORCHRUN = re.compile(r"Unable to shutdown process (\d+)")
TORCHRUN_LOG = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.MULTILINE)
ERROR = re.compile(
    r"^  time +: (\S+)$\n(?:^  \w+ *: .*$\n)*?^  traceback : (Traceback .*\n)((?:^  .*$\n)*)",
    re.MULTILINE,
)
FAILURES, ROOT_CAUSE = "\nFailures:\n", "\nRoot Cause (first observed failure):\n"


def killed_ranks(log: str) -> set[str]:
    """Return the process ids of ranks that a signal ended, as an operator or the kernel does."""
    return {*KILLED.findall(log)} - {*KILLED_BY_TORCHRUN.findall(log)}


def failing_lines(log: str) -> str:
    """Return the last lines of the error that the first failing rank raised, else of all ranks."""
    ranks = _first_error(log) or TORCHRUN_LOG.split(log)[0].strip()
    lines = [line.rstrip() for line in (ranks or log).split("\n") if line.strip()]
    return "\n".join(lines[-TAIL_LINES:]) or "no output"


def _first_error(log: str) -> str:
    """Return the error that torchrun calls the root cause, "" where it had none to show.

    It compares whole seconds: of several in one, the error that was printed first is the cause.
    """
    printed, _, report = log.partition(FAILURES)
    others, _, root = report.partition(ROOT_CAUSE)
    cause = ERROR.search(root)
    if cause is None:
        return ""
    found = [cause, *(each for each in ERROR.finditer(others) if each[1] == cause[1])]
    errors = [each[2] + textwrap.dedent(each[3]).rstrip() for each in found]
    places = [printed.find(error.rpartition("\n")[2]) for error in errors]
    return min(zip(places, errors, strict=True), key=lambda each: (each[0] < 0, each[0]))[1]
