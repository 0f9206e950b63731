"""Tests: unit (no privileges), kernel (a real kernel in namespaces), e2e (the scripts, and QEMU)."""

import pytest

# So that a failing assertion in a helper tells what it compared.
pytest.register_assert_rewrite("tests.agent", "tests.netns", "tests.wire")
