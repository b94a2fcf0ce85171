"""The supervisor: whatever happens to it or around it, no process of the command stays."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.1; done"


def start(script, grace=5):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pipelines.training.supervise",
            str(grace),
            "--",
            "sh",
            "-c",
            script,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def line(process):
    return process.stdout.readline().decode().strip()


def gone(pid, seconds=10):
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_of_the_command_is_passed_on(script, code):
    process = start(script)
    assert process.wait(20) == code
    assert process.stdout.read() == b""


def test_what_the_command_leaves_running_is_killed_when_it_ends():
    process = start("setsid sh -c 'echo $$; exec sleep 300' & sleep 0.5; exit 3")
    daemon = int(line(process))

    assert process.wait(20) == 3
    assert gone(daemon)


def test_a_sigterm_reaches_the_command_which_ends_in_its_own_way():
    process = start("trap 'echo saved; exit 4' TERM; echo ready; while :; do sleep 0.05; done")
    assert line(process) == "ready"

    process.send_signal(signal.SIGTERM)

    assert process.wait(20) == 4
    assert process.stdout.read() == b"saved\n"


def test_the_command_is_told_to_stop_when_the_parent_closes_stdin():
    process = start("trap 'echo saved; exit 4' TERM; echo ready; while :; do sleep 0.05; done")
    assert line(process) == "ready"

    process.stdin.close()

    assert process.wait(20) == 4


def test_after_the_grace_every_descendant_is_killed_even_in_other_sessions():
    process = start(f'setsid sh -c "echo \\$\\$; {STUBBORN}" & echo $$; {STUBBORN}', grace=0.3)
    pids = [int(text) for text in (line(process) for _ in range(4)) if text.isdigit()]
    assert len(pids) == 2

    process.send_signal(signal.SIGTERM)

    assert process.wait(20) == 137
    assert [gone(pid) for pid in pids] == [True, True]


def test_a_killed_supervisor_tells_the_command_to_stop():
    process = start("trap 'exit 4' TERM; echo $$; while :; do sleep 0.05; done")
    pid = int(line(process))

    process.kill()
    process.wait(20)

    assert gone(pid)


def test_the_command_cannot_keep_the_parents_pipe_open():
    process = start("readlink /proc/self/fd/0; sleep 300")
    assert line(process) == os.devnull
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGTERM


def test_a_wrong_call_says_how_to_call():
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training.supervise", "5", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("supervise GRACE_SECONDS -- COMMAND...\n")
