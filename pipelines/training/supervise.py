"""Runs a command and leaves no process of it behind: `supervise GRACE_SECONDS -- COMMAND...`.

The parent holds this process's stdin. When it closes (the parent died, however it died) or on
SIGTERM, the command gets SIGTERM, then GRACE_SECONDS, then every descendant gets SIGKILL; what the
command leaves running when it ends by itself is killed as well. Orphans cannot escape, because
this process is their subreaper. The exit code is the command's, 128 + n for a signal n.
Linux only (prctl). Nothing but the standard library and psutil: it starts at once.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Supervisor:
    """One supervised command."""

    def __init__(self, grace: float) -> None:
        """Give the command `grace` seconds between SIGTERM and SIGKILL."""
        self._grace = grace
        self._stop = False
        self._code: int | None = None

    def run(self, command: list[str]) -> int:
        """Run the command to its end or its stop; return its exit code."""
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        with contextlib.suppress(PermissionError):  # already the leader of its session
            os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, self._request_stop)
        # stdin must not be inherited: the command would hold the watched pipe open.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_us)  # noqa: PLW1509 - one thread
        deadline = float("inf")
        while self._code is None and time.monotonic() < deadline:
            if self._stop and deadline == float("inf"):
                os.kill(child.pid, signal.SIGTERM)  # unreaped, so the id is still its own
                deadline = time.monotonic() + self._grace
            self._wait()
            self._reap(child.pid)
        self._sweep(child.pid)
        assert self._code is not None
        child.returncode = self._code
        return self._code

    def _request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stop = True

    def _wait(self) -> None:
        """Wait a moment; less where stdin closes."""
        if self._stop:
            time.sleep(POLL_SECONDS)
        elif select.select([0], [], [], POLL_SECONDS)[0] and not os.read(0, 4096):
            self._stop = True

    def _reap(self, child: int) -> bool:
        """Collect every process that ended, adopted ones included; False where none is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                self._code = code if code >= 0 else 128 - code

    def _sweep(self, child: int) -> None:
        """Kill descendants until there are none; killed parents hand us their children."""
        while self._reap(child):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _die_with_us() -> None:
    """In the child: get SIGTERM when the supervisor itself is killed with SIGKILL."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Parse `GRACE -- COMMAND...` and run it."""
    grace, separator, *command = arguments
    if separator != "--" or not command:
        raise SystemExit(
            "usage: python -m pipelines.training.supervise GRACE_SECONDS -- COMMAND..."
        )
    return Supervisor(float(grace)).run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
