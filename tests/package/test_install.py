"""Install, upgrade, remove and purge, on fresh systems, with guests whose NICs must not notice."""

from __future__ import annotations

import re
from pathlib import Path

from harness.roots import CHECKOUT, Root, deb, field, versionless
from tests.package import wiring

COMMANDS = ("kvm-ifdown", "kvm-ifup", "kvm-ifup-post", "kvm-ifup-pre")
OURS = ("kvm-ifup", "kvmifup", "kvm-ifdown")
# Where Debian's own tools keep books about everything that is installed.
BOOKS = ("/var/lib/dpkg/", "/var/lib/apt/", "/var/cache/", "/var/log/", "/var/lib/systemd/deb-systemd-helper")
STATE = "cd /run/kvm-ifup && find state nic -type f -exec sha256sum {} +"


def status(root: Root, package: str) -> str:
    """What dpkg says about *package*; nothing when it knows none of that name."""
    asked = root.run("dpkg-query", "-W", "-f", "${db:Status-Status}", package, check=False)
    return asked.stdout


def test_install_on_an_empty_system(node: Root, built: Path) -> None:
    """One `apt install`, and the commands, their manual pages and their completion are there."""
    package = deb(built, "kvm-ifup")
    node.install(package)

    for command in COMMANDS:
        said = node.run(command, "--version").stdout
        assert said == f"{command} {field(package, 'Version')}\n"
        # A minimal system may be told not to unpack manual pages: this one is not.
        page = node.run("man", "--pager=cat", command, env={"MANWIDTH": "80"}).stdout
        assert f"{command} - " in page.replace("\u2010", "-")
        completion = f"source /usr/share/bash-completion/completions/{command} && complete -p {command}"
        assert "_kvm_ifup" in node.run("bash", "-c", completion).stdout
    for page in ("kvm-ifup.toml", "kvm-ifup-nic"):
        node.run("man", "5", page)
    assert node.run("dpkg", "--audit").stdout == ""
    assert node.run("dpkg", "--verify", "kvm-ifup").stdout == ""
    assert node.shell(
        "stat -c %U:%G:%a /etc/kvm-ifup /etc/kvm-ifup/config.toml /etc/kvm-ifup/conf.d /etc/kvm-ifup/ext"
    ) == ("root:root:755\nroot:root:644\nroot:root:755\nroot:root:755\n")
    assert "/etc/kvm-ifup/config.toml" in node.shell("dpkg-query -W -f '${Conffiles}' kvm-ifup")

    with wiring.guests(node):
        node.run("kvm-ifup-post", "tap0")
        assert wiring.master(node, "tap0") == "br0"


def test_the_pages_say_which_ganeti_debian_has(node: Root) -> None:
    """Debian 13's is a release candidate of 3.1."""
    release = node.shell("cut -d. -f1 /etc/debian_version").strip()
    candidate = node.shell("apt-cache policy ganeti").split("Candidate: ")[1].split("~")[0].split("-")[0]
    for page in ("README.md", "docs/ganeti.md"):
        text = " ".join((CHECKOUT / page).read_text(encoding="utf-8").split())
        said = re.findall(rf"Debian {release} has (?:Ganeti )?(\d[\d.]*\d)", text)
        assert said
        assert [one for one in said if not candidate.startswith(one)] == [], page


def test_a_guest_lives_through_upgrade_removal_and_purge(node: Root, built: Path, previous: Path) -> None:
    """Nothing that is done to the package changes what is wired; and a purge leaves nothing of ours."""
    node.run("apt-get", "install", "-y", "--no-install-recommends",
             *versionless(field(deb(built, "kvm-ifup"), "Depends")), network=True)  # fmt: skip
    before_install = node.files()
    both = ("kvm-ifup", "kvm-ifup-ganeti")
    node.install(*(deb(previous, package) for package in both))

    with wiring.guests(node):
        bare = wiring.network(node)
        node.run("kvm-ifup-post", "tap0")
        bridged = wiring.network(node)
        node.run("kvm-ifup-post", "tap1")
        wired = wiring.network(node)
        assert wiring.master(node, "tap0") == "br0"
        assert wiring.GUEST_IP in wiring.routes(node, "tap1")
        state = node.shell(STATE)

        # Upgrade: the newer package knows what the older one did.
        node.install(*(deb(built, package) for package in both))
        assert status(node, "kvm-ifup") == "installed"
        assert not wiring.difference(wired, wiring.network(node))
        assert node.shell(STATE) == state
        node.run("kvm-ifup-post", "tap1")
        assert not wiring.difference(wired, wiring.network(node))
        node.run("kvm-ifdown", "tap1")
        assert not wiring.difference(bridged, wiring.network(node))

        # Downgrade: what an older version may not be able to do is said, and what it has set aside is not lost.
        said = node.install(*(deb(previous, package) for package in both))
        assert "tap0 stays wired; if 0.1.0~previous cannot read its journal" in said
        assert "tap1 stays" not in said
        assert not wiring.difference(bridged, wiring.network(node))
        node.shell("mv /run/kvm-ifup/state/tap0.json /run/kvm-ifup/state/tap0.unreadable")

        # Removal: the guest stays plugged in, and the administrator is told how to undo it.
        said = node.run("apt-get", "remove", "-y", "kvm-ifup").stdout
        assert "tap0 stays wired" in said
        assert "tap1" not in said
        assert status(node, "kvm-ifup") == "config-files"
        assert not wiring.difference(bridged, wiring.network(node))
        node.install(*(deb(built, package) for package in both))
        node.run("kvm-ifdown", "tap0")
        assert not wiring.difference(bare, wiring.network(node))

        # Purge, of an installed package and with a guest plugged in.
        node.run("kvm-ifup-post", "tap0")
        assert not wiring.difference(bridged, wiring.network(node))
        node.run("apt-get", "purge", "-y", *both)
        assert [status(node, package) for package in both] == ["", ""]
        assert not wiring.difference(bridged, wiring.network(node))

    after = node.files()
    assert [path for path in after if any(name in path for name in OURS)] == []
    left = {
        path
        for path in before_install.keys() | after.keys()
        if before_install.get(path) != after.get(path) and not path.startswith(BOOKS)
    }
    assert left == set()
