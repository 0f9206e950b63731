"""The packages under test, and the systems that they are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import roots

SUITES = ("bookworm", "trixie")  # Debian 12 and 13

roots.require()


@pytest.fixture(scope="session")
def built() -> Path:
    """The directory with the packages and their source, as `./dev deb` leaves it."""
    directory = roots.CHECKOUT / "build/deb"
    if not directory.is_dir():
        pytest.exit("there are no packages yet: ./dev deb", returncode=3)
    return directory


@pytest.fixture(scope="session")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with packages of the same content and a lower version, to upgrade from."""
    directory = tmp_path_factory.mktemp("previous")
    script = roots.CHECKOUT / "debian/build"
    roots.run([script, directory, "0.1.0~previous"])
    return directory


@pytest.fixture(scope="session", params=SUITES)
def bare(request: pytest.FixtureRequest, built: Path) -> Path:
    """A minimal system with a manual reader; what the package depends on is at hand, but not installed."""
    suite: str = request.param
    needed = roots.versionless(roots.field(roots.deb(built, "kvm-ifup"), "Depends"))
    return roots.archive(suite, ["man-db"], sorted(needed))


@pytest.fixture
def node(bare: Path) -> Iterator[roots.Root]:
    """A fresh copy of the minimal system."""
    with roots.root(bare) as fresh:
        yield fresh
