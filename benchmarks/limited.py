"""A pytest plugin for `benchmarks.gpu`: what a time limit or a dead GPU cuts from the kernel tests is small and named.

Loaded with `-p benchmarks.limited`, also in the processes of pytest-xdist.
"""

from __future__ import annotations

import collections
import os
import sys
import time

import pytest

UNTIL = "FASTFLOW_TESTS_UNTIL"  # environment variable: the time.time() after which no test begins
NOT_BEGUN = "no time left"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First the first parameters of every test, then the second of every test: a limit cuts a little of each."""
    seen: collections.Counter[str] = collections.Counter()
    turns = {}
    for item in items:
        test = item.nodeid.partition("[")[0]
        turns[item.nodeid] = seen[test]
        seen[test] += 1
    items.sort(key=lambda item: turns[item.nodeid])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin too late."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip(NOT_BEGUN)


def device_answers() -> bool:
    """False after an error that makes every further call of this process fail, such as an illegal memory access."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Watch:
    """Ends a process whose GPU is lost to it, before it fails all tests that others could still run."""

    def __init__(self, replaceable: bool) -> None:
        self.replaceable, self.failed = replaceable, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.failed and not device_answers():
            if self.replaceable:
                os._exit(1)  # pytest-xdist starts another
            pytest.exit(f"the device gave up in {nodeid}", returncode=1)
        self.failed = False


def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    # With pytest-xdist, this process only hands out tests.
    if worker or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Watch(worker), "fastflow-watch")
