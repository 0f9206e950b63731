"""Tests of this run that are done somewhere else, with results as if they were done here.

There, `python3 -m pytest -p harness.remote …` writes a line for each result. Here, a conftest gives each of its tests
to `Remote.protocol`, which reads these lines. All tests are done in one run of pytest over there, in order, so that
its start is paid once; results are told as they come.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

# Over there, the descriptor to which results are written; it says as well that this is over there.
VARIABLE = "KVM_IFUP_RESULTS"
Follow = Callable[[str], Generator[str, None, tuple[int, str]]]


def there() -> bool:
    """Whether this process is the one that does the tests."""
    return VARIABLE in os.environ


# --- over there: pytest's hooks -------------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A part of a test is over: setup, the test, or teardown."""
    why = report.longrepr
    _tell(
        test=report.nodeid,
        when=report.when,
        outcome=report.outcome,
        # Where and why, if a test was skipped; else the text that a person reads.
        longrepr=[str(word) for word in why] if isinstance(why, tuple) else str(why or "") or None,
        sections=report.sections,
        duration=report.duration,
        wasxfail=getattr(report, "wasxfail", None),
    )


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A test is over."""
    _tell(test=nodeid, when=None)


def _tell(**what: object) -> None:
    with contextlib.suppress(KeyError):  # no variable: the plugin is loaded here
        os.write(int(os.environ[VARIABLE]), json.dumps(what).encode() + b"\n")


# --- here -----------------------------------------------------------------------------------------------------


def command(tests: Sequence[str], python: str = "/usr/bin/python3") -> str:
    """The shell script that does *tests* over there, in the checkout: results to its output, the rest to stderr."""
    settings = "-q -p no:cacheprovider -p harness.remote"
    return f"exec 3>&1 >&2; {VARIABLE}=3 exec {python} -m pytest {settings} {shlex.join(tests)}"


class Remote:
    """The run over there. *follow* runs a shell script there; what it raises fails the test that was being done."""

    def __init__(self, tests: Sequence[str], follow: Follow) -> None:
        self._lines = follow(command(tests))
        self._over = ""  # why there are no more results

    def protocol(self, item: pytest.Item) -> None:
        """Report the results of *item*, which comes next."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while (told := self._next(item))["when"] is not None:
            item.ihook.pytest_runtest_logreport(report=_report(item, told))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def _next(self, item: pytest.Item) -> dict[str, Any]:
        """What is told next, which must be of *item*."""
        failed = {"test": item.nodeid, "when": "call", "outcome": "failed", "sections": [], "duration": 0.0}
        if item.stash.get(_FAILED, False):
            return {"when": None}
        try:
            if not self._over:
                told: dict[str, Any] = json.loads(next(self._lines))
                if told["test"] == item.nodeid:
                    return told
                self._over = f"there, it was the turn of {told['test']}"
        except StopIteration as end:
            code, said = end.value
            self._over = f"the run over there has ended, exit {code}:\n{said[-6000:]}"
        except (AssertionError, OSError, pytest.fail.Exception) as error:
            self._over = str(error)
        item.stash[_FAILED] = True
        return {**failed, "longrepr": self._over}


_FAILED = pytest.StashKey[bool]()


def _report(item: pytest.Item, told: dict[str, Any]) -> pytest.TestReport:
    """A result as pytest has it."""
    why = told["longrepr"]
    report = pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=told["outcome"],
        longrepr=(why[0], int(why[1]), why[2]) if isinstance(why, list) else why,
        when=told["when"],
        sections=[(name, text) for name, text in told["sections"]],
        duration=told["duration"],
    )
    if told.get("wasxfail") is not None:
        report.wasxfail = told["wasxfail"]
    return report
