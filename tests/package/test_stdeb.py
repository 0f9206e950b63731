"""The package that stdeb makes from setup.py, next to the one that debian/ makes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import roots

TOOLS = ("build-essential", "debhelper", "dh-python", "fakeroot", "python3-all", "python3-setuptools", "python3-stdeb")


@pytest.fixture(scope="module")
def made(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The .deb that Debian 12's stdeb makes of the source package's content, without the network."""
    kept = tmp_path_factory.mktemp("stdeb")
    with roots.root(roots.archive("bookworm", TOOLS)) as fresh:
        shutil.copytree(built, fresh.path / "tmp/built")
        fresh.shell(
            "cd /tmp && dpkg-source --extract built/*.dsc source && cd source && rm -r debian &&"
            "python3 setup.py --command-packages=stdeb.command bdist_deb >&2"
        )
        (found,) = (fresh.path / "tmp/source/deb_dist").glob("*.deb")
        yield Path(shutil.copy(found, kept))


def commands(package: Path) -> set[str]:
    """The paths of what a package puts on root's PATH."""
    return {path for path in roots.contents(package) if Path(path).parent.name in ("bin", "sbin")}


def modules(package: Path) -> set[str]:
    """The names of the Python files of the module, wherever it is."""
    return {
        path.split("/kvmifup/")[1] for path in roots.contents(package) if "/kvmifup/" in path and path.endswith(".py")
    }


def test_same_name_commands_modules_and_dependencies(made: Path, built: Path) -> None:
    """One can take the place of the other."""
    ours = roots.deb(built, "kvm-ifup")
    for name in ("Package", "Architecture", "Section", "Maintainer"):
        assert roots.field(made, name) == roots.field(ours, name)
    assert roots.field(made, "Version").split("-")[0] == roots.field(ours, "Version")
    assert commands(made) == commands(ours)
    assert modules(made) == modules(ours)
    # dh_python3 repeats for itself what setup.py requires, without versions; that adds nothing.
    ours_needs, made_needs = (roots.relations(roots.field(package, "Depends")) for package in (ours, made))
    assert ours_needs <= made_needs
    assert made_needs - ours_needs <= {one.split("(")[0] for one in ours_needs}
    assert "/etc/kvm-ifup/config.toml" in roots.contents(made)


def test_it_installs_and_runs(made: Path, node: roots.Root, built: Path) -> None:
    """On both Debians; and it is replaced by, and replaces, the other like any version of the same package."""
    node.install(made)
    for command in sorted(commands(made)):
        name = Path(command).name
        assert node.run(name, "--version").stdout.startswith(f"{name} ")
        assert node.shell(f"command -v {name}") == f"{command}\n"
    assert node.run("dpkg", "--audit").stdout == ""
    node.run("apt-get", "purge", "-y", "kvm-ifup")
    node.install(roots.deb(built, "kvm-ifup"))
    node.run("kvm-ifup-pre", "--version")
