"""What QEMU's command line says of the guest's NIC on a tap."""

from __future__ import annotations

import pytest

from kvmifup.node.guests import is_qemu, mac_in

MAC = "aa:00:00:35:ac:01"
DEVICE = f"virtio-net-pci,id=nic0,netdev=net0,mac={MAC}"


@pytest.mark.parametrize(
    "argv",
    [
        ["-netdev", "tap,id=net0,ifname=tap0,script=no", "-device", DEVICE],
        ["--netdev", "type=tap,ifname=tap0,id=net0", "--device", DEVICE],
        ["-netdev", "tap,id=net0,fd=8,vhost=on,vhostfd=9", "-device", DEVICE],
        ["-netdev", "tap,id=net0,fds=7:8:9,vhost=on", "-device", f"{DEVICE},mq=on"],
        ["-netdev", '{"type":"tap","fd":"8","id":"net0"}', "-device", f'{{"netdev":"net0","mac":"{MAC}"}}'],
        ["-nic", f"tap,ifname=tap0,model=e1000,mac={MAC.upper()}"],
        ["-netdev", "tap,id=net1,ifname=tap1", "-device", "e1000,netdev=net1,mac=02:00:00:00:00:01",
         "-netdev", "tap,id=net0,ifname=tap0", "-device", DEVICE],
    ],
)  # fmt: skip
def test_the_mac_is_found_in_every_way_to_say_it(argv: list[str]) -> None:
    assert mac_in(["qemu", *argv], "tap0", {"8"}) == MAC


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["-netdev", "tap,id=net0,ifname=tap1", "-device", DEVICE],  # of another tap
        ["-netdev", "tap,id=net0,fd=9", "-device", DEVICE],  # of another descriptor
        ["-netdev", "tap,id=net0,ifname=tap0", "-device", "virtio-net-pci,netdev=net0"],  # QEMU makes one up
        ["-netdev", "tap,ifname=tap0", "-device", "virtio-net-pci,mac=02:00:00:00:00:01"],  # neither has a name
        ["-netdev", "{broken", "-device", DEVICE],
        ["-netdev", "[1]", "-device", '{"a":1'],
        ["-netdev"],
    ],
)
def test_what_is_not_said_is_not_known(argv: list[str]) -> None:
    assert mac_in(["qemu", *argv], "tap0", {"8"}) is None


def test_what_calls_itself_qemu() -> None:
    assert all(map(is_qemu, ("/usr/bin/qemu-system-x86_64", "qemu-kvm", "/usr/bin/kvm")))
    assert not any(map(is_qemu, ("python3", "/usr/sbin/kvm-ifupd", "", "kvmtool")))
