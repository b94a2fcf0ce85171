"""Parsing gives the same verdict wherever and beside whatever it happens."""

import ast
import contextlib
import gc
import sys
import threading
import time

import pytest

from pipelines.syntax import is_python, parse_python


@pytest.fixture
def interrupted():
    """Let other threads run whenever memory is collected in a parse, which is often."""

    def wait(*_):
        if threading.current_thread().name.startswith("parse"):
            time.sleep(0.0001)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(100)
    gc.callbacks.append(wait)
    yield
    gc.callbacks.remove(wait)
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(interval)


def test_a_library_that_parses_at_the_same_moment_breaks_no_parse(interrupted):
    source = "def f(x):\n    return [x + 1, (x, {x: x})]\n" * 20
    want, over = ast.dump(ast.parse(source)), threading.Event()

    def library():
        while not over.is_set():
            with contextlib.suppress(SystemError):  # its own trouble
                ast.parse("x = 1")
            time.sleep(0.0005)

    thread = threading.Thread(target=library)
    thread.start()
    try:
        found = [ast.dump(parse_python(source)) for _ in range(20)]
    finally:
        over.set()
        thread.join()

    assert found == [want] * 20
    assert gc.isenabled()


def test_a_source_is_python_or_not():
    assert (is_python("x = 1"), is_python("x = ")) == (True, False)
