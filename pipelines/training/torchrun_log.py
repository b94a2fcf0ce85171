"""What torchrun and its ranks wrote to a run's log: who was killed, and what failed first."""

import re
import textwrap

TAIL_LINES = 15
# torchrun's report: what a signal ended (its own SIGTERM to the others apart), what it killed
# itself because it did not end, where its own log begins after that of the ranks, and the error of
# the rank that failed first: the others' are often those of a lost connection to it.
KILLED = re.compile(r"exitcode\s*: -(?!15\b)\d+ \(pid: (\d+)\)")
KILLED_BY_TORCHRUN = re.compile(r"Unable to shutdown process (\d+)")
TORCHRUN_LOG = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.MULTILINE)
ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):$.*?^  traceback : (Traceback [^\n]*\n)(.*?)^={9,}$",
    re.MULTILINE | re.DOTALL,
)


def killed_ranks(log: str) -> set[str]:
    """Return the process ids of ranks that a signal ended, as an operator or the kernel does."""
    return {*KILLED.findall(log)} - {*KILLED_BY_TORCHRUN.findall(log)}


def failing_lines(log: str) -> str:
    """Return the last lines of the error that the first failing rank raised, else of all ranks."""
    cause = ROOT_CAUSE.search(log)
    ranks = cause[1] + textwrap.dedent(cause[2]) if cause else TORCHRUN_LOG.split(log)[0].strip()
    lines = [line.rstrip() for line in (ranks or log).split("\n") if line.strip()]
    return "\n".join(lines[-TAIL_LINES:]) or "no output"
