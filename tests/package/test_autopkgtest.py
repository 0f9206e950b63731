"""debian/tests: the kernel and end-to-end tests against the installed package, as autopkgtest runs them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path

import pytest

from harness import roots

# Debian 12's Python and pyroute2 run the same tests from the checkout (./dev kernel, ./dev e2e).
SUITES = ("trixie",)
# What another Python, pyroute2 or place of the files can change: pyproject.toml says which tests these are. The kernel
# is the same, and has answered all of them on Debian 12.
SELECTED = {"kernel": "-m 'not sweep and (userns or pyroute2)'"}

_STANZAS = [
    dict(Parser().parsestr(stanza).items())
    for stanza in "\n".join(
        line for line in (roots.CHECKOUT / "debian/tests/control").read_text().splitlines() if not line.startswith("#")
    ).split("\n\n")
]
TESTS = {stanza["Features"].removeprefix("test-name="): stanza for stanza in _STANZAS}


def fetch(packages: Sequence[str], directory: Path) -> None:
    """Get *packages* as requirements-dev.txt pins them, with this machine's pip: it knows the way to PyPI from here."""
    pinned = (roots.CHECKOUT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    settings = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_CERT_"))}
    for package in packages:
        (requirement,) = (line for line in pinned if line.split("=")[0] == package)
        roots.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, requirement],
            env={**roots.PROXIES, **settings},
        )


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("test", sorted(TESTS))
def test_against_the_installed_package(suite: str, test: str, built: Path, tmp_path: Path) -> None:
    """Each test of debian/tests/control passes on a system with just what it depends on, and the package."""
    needed = {one.strip() for one in TESTS[test]["Depends"].split(",") if one.strip()}
    assert "@" in needed
    with roots.root(roots.archive(suite, sorted(needed - {"@"}))) as fresh:
        fresh.install(roots.deb(built, "kvm-ifup"))
        source = fresh.path / "tmp/source"
        source.mkdir()
        (archive,) = built.glob("kvm-ifup_*.tar.xz")
        roots.run(["tar", "--extract", "--file", archive, "--strip-components=1", "--directory", source])
        # What is under test is what is installed.
        shutil.rmtree(source / "kvmifup")
        shutil.rmtree(source / "scripts")
        # Not straight into the system: pip resolves the path, and this one leads through /proc.
        fetch(TESTS[test]["Test-Command"].split()[2:], tmp_path)
        shutil.copytree(tmp_path, fresh.path / "tmp/wheels")
        done = fresh.run(
            *["sh", "-eu", "-c", f"cd /tmp/source && {TESTS[test]['Test-Command']}"],
            network="needs-internet" in TESTS[test]["Restrictions"],
            env={"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/tmp/wheels", "PYTEST_ADDOPTS": SELECTED.get(test, "")},
            check=False,
            timeout=2 * 60 * 60,  # whole suites, on a machine that may be busy
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
        assert " passed" in done.stdout
        assert " skipped" not in done.stdout
