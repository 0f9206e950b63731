"""How the packages are built, and what Debian's own checker says about them."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import roots

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


def test_the_documentation_in_the_package_is_whole(built: Path, tmp_path: Path) -> None:
    """Every page of docs/ and of libvirt is there. Links lead to files, and so does what kvm-ifup(7) names."""
    roots.run(["dpkg-deb", "--extract", roots.deb(built, "kvm-ifup"), tmp_path])
    directory = tmp_path / "usr/share/doc/kvm-ifup"
    pages = {str(page.relative_to(directory)) for page in directory.rglob("*.md")}
    source = {str(page.relative_to(roots.CHECKOUT)) for page in (roots.CHECKOUT / "docs").glob("*.md")}
    assert pages == {"README.md", "integration/libvirt/README.md", *source}
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)[^)]*\)", (directory / page).read_text(encoding="utf-8"))
        there = (directory / page).parent
        assert [one for one in links if "://" not in one and not (there / one).exists()] == [], page
    overview = gzip.decompress((tmp_path / "usr/share/man/man7/kvm-ifup.7.gz").read_bytes()).decode()
    named = set(re.findall(r"\\fI(\w+\.md)\\fR", overview.replace("\\&", "")))
    assert {"qemu.md", "ganeti.md", "libvirt.md", "bridged.md", "routed.md"} <= named
    assert [name for name in named if f"docs/{name}" not in pages] == []


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


# --- ./dev deb on a machine that only builds ---------------------------------------------------------------

# What git knows or would add: a clone would lack what is not committed.
COPY = """
cd "$0"
git ls-files -z --cached --others --exclude-standard | tar -c --null --no-recursion -T - | tar -x -C "$1"
"""


def test_dev_deb_installs_only_what_building_takes() -> None:
    """On a fresh Debian 12; and the README says how much that is."""
    readme = (roots.CHECKOUT / "README.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"about (\d+) Debian\s+packages, (\d+) MB", readme)
    with roots.root(roots.archive("bookworm", ["git"])) as node:
        clone = node.path / "srv/kvm-ifup"
        clone.mkdir()
        roots.run(["sh", "-eu", "-c", COPY, roots.CHECKOUT, clone])
        node.shell("cd /srv/kvm-ifup && chown -R 0:0 . && git init -q && git add -A")
        count = "dpkg-query -W | wc -l; apt-get clean; du -xsm --exclude=/srv --exclude=/var/lib/apt / 2>/dev/null"
        before = node.shell(count).split()
        done = node.run("sh", "-c", "cd /srv/kvm-ifup && ./dev deb", network=True)
        after = node.shell(count).split()
        assert done.stdout.count("_all.deb") == 2
        packages, megabytes = (int(after[i]) - int(before[i]) for i in (0, 1))
        print(f"{packages} packages, {megabytes} MB")
        installed = node.shell("dpkg-query -W -f '${Package}\n'").split()
    assert abs(packages - int(said[0])) <= 10
    assert abs(megabytes - int(said[1])) <= 50
    assert not {"lintian", "mmdebstrap", "openvswitch-switch", "qemu-system-x86"} & set(installed)
