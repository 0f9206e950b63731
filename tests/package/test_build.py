"""How the packages are built, and what Debian's own checker says about them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package import roots

LINTIAN = ("lintian", "--allow-root", "--fail-on=error,warning")
# All that debian/control names has to be there; not the compiler that every source package may take for granted.
BUILD = "dpkg-checkbuilddeps -I && dpkg-buildpackage --no-check-builddeps --no-sign"


def sums(directory: Path) -> dict[str, str]:
    """The SHA-256 of each binary package."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.deb")}


def test_the_version_is_the_module_s(built: Path) -> None:
    """The changelog and the module agree."""
    namespace: dict[str, str] = {}
    exec((roots.CHECKOUT / "kvmifup/__init__.py").read_text(encoding="utf-8"), namespace)
    assert roots.field(roots.deb(built, "kvm-ifup"), "Version") == namespace["__version__"]


def test_two_builds_are_identical(built: Path, tmp_path: Path) -> None:
    """Built again from the source package, elsewhere and by somebody with other habits: the same bytes."""
    (source,) = built.glob("*.dsc")
    elsewhere = tmp_path / "a-rather-different-place" / "source"
    elsewhere.parent.mkdir()
    roots.run(["dpkg-source", "--extract", source, elsewhere])
    for path in elsewhere.rglob("*"):
        os.utime(path, (981173106, 981173106), follow_symlinks=False)
    roots.run(
        ["sh", "-c", f"umask 077; chmod -R go= .; {BUILD} --build=binary"],
        cwd=elsewhere,
        env={"TZ": "Pacific/Chatham", "LC_ALL": "C", "DEB_BUILD_OPTIONS": "nocheck", "DEB_BUILD_PROFILES": "nocheck"},
    )
    assert sums(elsewhere.parent) == sums(built)


def test_lintian_of_debian_12(built: Path) -> None:
    """No error and no warning, for source and packages."""
    (changes,) = built.glob("*.changes")
    done = roots.run([*LINTIAN, changes], check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def trixie(built: Path) -> Iterator[roots.Root]:
    """Debian 13 with what builds and checks packages."""
    with roots.root(roots.archive("trixie", ["lintian", *roots.build_needs()])) as fresh:
        shutil.copytree(built, fresh.path / "tmp/built")
        yield fresh


def test_lintian_of_debian_13(trixie: roots.Root) -> None:
    """No error and no warning, for source and packages."""
    done = trixie.run("sh", "-c", f"{' '.join(LINTIAN)} /tmp/built/*.changes", check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_debian_13_builds_it(trixie: roots.Root) -> None:
    """From the source package, unit tests and all, with its debhelper and its Python."""
    trixie.shell(f"cd /tmp && dpkg-source --extract built/*.dsc source && cd source && {{ {BUILD}; }} >&2")
    done = trixie.run("sh", "-c", f"{' '.join(LINTIAN)} /tmp/*.changes", check=False)
    assert (done.returncode, done.stdout) == (0, "")
