"""Tests: unit (no privileges), kernel (a real kernel in namespaces), e2e (the scripts, and QEMU)."""

import signal

import pytest

# So that a failing assertion in a helper tells what it compared.
pytest.register_assert_rewrite("harness.agents", "harness.guests", "harness.hooks", "harness.tools", "harness.wire")

# What is started from here must not ignore what nohup, or a shell that started us in the background, had us ignore.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
