"""What failed is read from the log that torchrun and its ranks leave."""

from pipelines.training.torchrun_log import failing_lines, killed_ranks

RANKS = """\
2026-01-01 10:00:00 INFO head loss: fused
Traceback (most recent call last):
  File "trainer.py", line 70, in train
    meter.start()
IsADirectoryError: [Errno 21] Is a directory: 'metrics.jsonl'
Traceback (most recent call last):
  File "loss.py", line 20, in evaluate
    distributed.all_reduce(total)
RuntimeError: Connection closed by peer [127.0.0.1]:4711
"""
REPORT = """\
E0101 10:00:01.0 7 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)
Traceback (most recent call last):
  File "run.py", line 1, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
pipelines.training.trainer FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-01-01_10:00:{late}
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {other} (pid: 12)
  error_file: <N/A>
  traceback : {theirs}
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_10:00:00
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: error.json
  traceback : {first}
============================================================
"""
TRACED = """\
Traceback (most recent call last):
    File "trainer.py", line 70, in train
      meter.start()
  IsADirectoryError: [Errno 21] Is a directory: 'metrics.jsonl'
  """
BROKEN = """\
Traceback (most recent call last):
    File "loss.py", line 20, in evaluate
      distributed.all_reduce(total)
  RuntimeError: Connection closed by peer [127.0.0.1]:4711
  """


def test_the_rank_that_failed_first_is_quoted_and_not_what_its_end_broke_in_others():
    report = REPORT.format(
        other=1, theirs=TRACED.replace("IsADir", "Other"), first=TRACED, late="01"
    )

    assert failing_lines(RANKS + report) == "\n".join(RANKS.split("\n")[1:5])


def test_of_errors_in_one_second_the_one_that_was_printed_first_is_quoted():
    """torchrun compares whole seconds, and takes the lowest rank of those that failed in one."""
    report = REPORT.format(other=1, theirs=TRACED, first=BROKEN, late="00")

    assert failing_lines(RANKS + report) == "\n".join(RANKS.split("\n")[1:5])
    assert failing_lines(report) == "\n".join(RANKS.strip().split("\n")[5:])
    report = REPORT.format(other=1, theirs=BROKEN, first=TRACED, late="00")
    assert failing_lines(RANKS + report) == "\n".join(RANKS.split("\n")[1:5])


def test_without_an_error_of_torchrun_the_last_lines_of_the_ranks_are_quoted():
    report = REPORT.format(
        other=-9, theirs="Signal 9", first="Signal 9 (SIGKILL) received", late="00"
    )

    assert failing_lines(RANKS + report) == RANKS.strip()
    assert failing_lines("line\n" * 40) == "\n".join(["line"] * 15)
    assert failing_lines("") == "no output"


def test_a_rank_is_killed_where_neither_torchrun_stopped_it_nor_killed_it_itself():
    def log(code, more=""):
        return RANKS + more + REPORT.format(other=code, theirs="Signal", first=TRACED, late="00")

    assert killed_ranks(log(-9)) == {"12"}
    assert killed_ranks(log(-15)) == set()
    assert killed_ranks(log(-9, "W0101 Unable to shutdown process 12 via SIGTERM\n")) == set()
