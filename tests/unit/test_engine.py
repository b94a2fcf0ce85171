"""The shard engine: same bytes on any runner, lost workers cost their own shard."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.engine import Job, Usage, Work, make_shard
from pipelines.manifest import sha256_file
from tests.assets.shard_functions import die_always, die_once, double, tell_process


@pytest.fixture
def jobs(tmp_path):
    made = []
    for number in range(5):
        path = tmp_path / f"in-{number}"
        path.write_text("".join(f"{number}-{line}\n" for line in range(number + 1)))
        made.append(Job(f"out-{number}.txt", (path,)))
    return made


def run(folder, jobs, function=double, workers=1, runner="threads", **params):
    folder.mkdir(exist_ok=True)
    return Work(folder, workers=workers).map(function, jobs, params, runner=runner)


def runs(pid):
    """Say whether a process is there and not only unreaped, as below an idle first process."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_result_is_the_same_for_any_runner_and_number_of_workers(tmp_path, jobs):
    alone = run(tmp_path / "one", jobs)
    threads = run(tmp_path / "threads", jobs, workers=3)
    processes = run(tmp_path / "processes", jobs, workers=2, runner="processes")

    assert threads == alone
    assert processes == alone
    assert [report.shard.file for report in alone] == [job.file for job in jobs]


def test_worker_processes_stay_for_the_maps_that_follow(tmp_path, jobs):
    makers = []
    for number in range(3):
        folder = tmp_path / str(number)
        run(folder, jobs, tell_process, 2, "processes")
        makers.append({(folder / job.file).read_text() for job in jobs})

    assert len(set.union(*makers)) <= 2
    assert str(os.getpid()) not in set.union(*makers)


def test_worker_processes_end_with_a_program_that_is_killed(tmp_path):
    (tmp_path / "in").touch()
    program = (
        "import os, signal, sys; from pathlib import Path; from pipelines.engine import Job, Work;"
        "from tests.assets.shard_functions import tell_process;"
        "folder = Path(sys.argv[1]); jobs = [Job(f'out-{n}', (folder / 'in',)) for n in range(4)];"
        "Work(folder, workers=2).map(tell_process, jobs, {}, runner='processes');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    makers = {int((tmp_path / f"out-{number}").read_text()) for number in range(4)}

    deadline = time.monotonic() + 30
    while any(runs(pid) for pid in makers) and time.monotonic() < deadline:
        time.sleep(0.1)

    assert makers
    assert [pid for pid in makers if runs(pid)] == []


def test_a_killed_worker_process_costs_only_unfinished_shards(tmp_path, jobs):
    alone = run(tmp_path / "one", jobs)
    survived = run(
        tmp_path / "two", jobs, die_once, 2, "processes", marker=str(tmp_path / "marker")
    )

    assert survived == alone
    assert (tmp_path / "marker").exists()


def test_workers_that_always_die_end_in_an_error_that_says_what_to_do(tmp_path, jobs):
    with pytest.raises(RuntimeError, match="died three times while making out-0.txt; .* lower"):
        run(tmp_path / "x", jobs, die_always, 2, "processes")


def test_a_shard_that_kills_its_worker_never_runs_in_this_process(tmp_path, jobs):
    run(tmp_path / "x", jobs[1:])

    with pytest.raises(RuntimeError, match="died three times while making out-0.txt"):
        run(tmp_path / "x", jobs, die_always, 2, "processes")


def test_a_shard_changed_after_it_was_finished_is_made_again(tmp_path, jobs):
    before = run(tmp_path / "x", jobs)
    (tmp_path / "x" / "out-1.txt").write_text("tampered with")

    after = run(tmp_path / "x", jobs)

    assert after == before
    assert sha256_file(tmp_path / "x" / "out-1.txt") == before[1].shard.sha256


def test_samples_are_capped_for_each_reason(tmp_path, jobs):
    work = Work(tmp_path)
    reports = run(tmp_path / "x", jobs) * 10

    samples = work.samples(reports)

    assert list(samples) == ["first"]
    assert len(samples["first"]) == 20
    assert samples["first"][1] == {"id": "1-0", "reason": "first", "detail": ""}


def test_no_jobs_make_no_shards_with_any_number_of_workers(tmp_path):
    assert Work(tmp_path, workers=2).map(print, [], {}, runner="processes") == ()


@pytest.mark.parametrize("runner", ["threads", "processes"])
def test_a_map_that_was_finished_before_a_kill_is_passed_over(tmp_path, jobs, runner):
    first = run(tmp_path / "a", jobs)

    assert run(tmp_path / "a", jobs, workers=2, runner=runner) == first


class LossyCluster:
    """Makes shards in another order, and loses every second worker at first."""

    workers = 3

    def __init__(self):
        self.asked = []

    def make(self, function, folder, jobs, params):
        self.asked.append([job.file for job in jobs])
        for number, job in reversed(list(enumerate(jobs))):
            if len(self.asked) > 1 or number % 2 == 0:
                report, _ = make_shard(function, folder, job, params)
                yield job, report, Usage(2.0, 1000)


def test_a_cluster_makes_the_same_shards_and_is_asked_again_for_lost_ones(tmp_path, jobs):
    alone = run(tmp_path / "one", jobs)
    cluster = LossyCluster()
    (tmp_path / "cluster").mkdir()
    work = Work(tmp_path / "cluster", cluster=cluster)

    made = work.map(double, jobs, {})

    assert made == alone
    assert cluster.asked == [[job.file for job in jobs], ["out-1.txt", "out-3.txt"]]
    assert (work.workers, work.child_cpu, work.child_peak_rss) == (3, 10.0, 1000)
