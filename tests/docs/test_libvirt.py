"""The hook under Debian's own libvirtd, with guests of QEMU's TCG: starts, ends, and live migrations.

The machines are Debian 12 roots with libvirt in them, made once by mmdebstrap and kept in the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.docs.machine import CLEAN, ROOT, Machine, cable, machine, require
from tests.docs.test_examples import journals, until, uplink, wired

PACKAGES = (
    "iproute2",
    "libvirt-clients",
    "libvirt-daemon-driver-qemu",
    "libvirt-daemon-system",
    "procps",
    "python3-pyroute2",
    "python3-tomli",
    "qemu-system-x86",
)
# What libvirt of the next Debian does can be had by a variable.
SUITE = os.environ.get("KVM_IFUP_LIBVIRT_SUITE", "bookworm")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvm-ifup-docs"

# The root is never written to: an overlay takes what the machine changes. There is no /dev/kvm.
SETUP = """
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/root /mnt/upper /mnt/work
mount -t overlay -o lowerdir="$1",upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/net dev/pts dev/shm
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 ptmx:5:2 net/tun:10:200; do
    IFS=:
    set -- "$1" "$2" "$3" $node
    unset IFS
    mknod -m 666 "dev/$4" c "$5" "$6"
done
mount -t devpts devpts dev/pts
mkdir -p ".$0" shared
mount --bind "$0" ".$0"
mount --bind "$2" shared
mkdir -p "$1/../capabilities"
mount --bind "$1/../capabilities" var/cache/libvirt  # else each machine asks QEMU anew what it can do
ln -s "$0"/scripts/* usr/sbin
mkdir -p etc/libvirt/hooks/qemu.d
ln -s "$0/integration/libvirt/kvm-ifup" etc/libvirt/hooks/qemu.d
hostname "$3"
ip link set lo up
exec chroot . sh -c 'echo ready; sleep infinity & wait'
"""

# No polkit, no log daemon, no cgroups; two machines must not look like one to libvirt.
CONFIGURE = """
cat > /etc/libvirt/libvirtd.conf <<END
auth_unix_rw = "none"
unix_sock_dir = "/shared/$(hostname)"
host_uuid = "$(cat /proc/sys/kernel/random/uuid)"
END
cat > /etc/libvirt/qemu.conf <<END
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
END
# What libvirt calls, and with what, from the same place as the hook.
cat > /etc/libvirt/hooks/qemu.d/trace <<END
#!/bin/sh
echo "\\$1 \\$2 \\$3" >> /tmp/trace
END
chmod 755 /etc/libvirt/hooks/qemu.d/trace
mkdir "/shared/$(hostname)"
# libvirt looks its own name up, and here is nobody to ask.
echo "127.0.0.1 localhost $(hostname)" > /etc/hosts
: > /etc/resolv.conf
libvirtd --daemon
"""

MAC = "aa:00:00:35:ac:01"


@pytest.fixture(scope="module")
def root() -> Path:
    """A Debian root with libvirt."""
    require({"mmdebstrap": "mmdebstrap"})
    made = CACHE / f"{SUITE}-libvirt"
    listed = made / "packages"
    if not listed.exists() or listed.read_text().split() != list(PACKAGES):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE]
        subprocess.run([*argv, str(made / "root")], env=CLEAN, check=True)
        listed.write_text("\n".join(PACKAGES))
    return made / "root"


class Hosts:
    """libvirt hosts; they see each other's files in /shared."""

    def __init__(self, root: Path, shared: Path, stack: ExitStack) -> None:
        self._root, self._shared, self._stack = root, shared, stack

    def add(self, name: str) -> Host:
        """One more."""
        made = self._stack.enter_context(machine(SETUP, str(self._root), str(self._shared), name))
        made.run(CONFIGURE)
        return Host(made, name)


class Host:
    """A machine with libvirtd."""

    def __init__(self, node: Machine, name: str) -> None:
        self.node, self.name = node, name
        self.uri = f"qemu:///system?socket=/shared/{name}/libvirt-sock"

    def virsh(self, command: str) -> str:
        """The output of a virsh command that has to succeed."""
        return self.node.run(f"virsh --quiet -c '{self.uri}' {command}").stdout

    def refuse(self, command: str) -> str:
        """The complaint of a virsh command that has to fail."""
        done = self.node.attempt(f"virsh --quiet -c '{self.uri}' {command}")
        assert done.returncode != 0
        return done.stderr

    def define(self, xml: str, name: str = "web1") -> None:
        """Write a guest's XML to a file of its name."""
        self.node.run(f"cat > /tmp/{name}.xml <<'END'\n{xml}\nEND")

    def start(self, xml: str, name: str = "web1") -> None:
        """Start a guest."""
        self.define(xml, name)
        self.virsh(f"create /tmp/{name}.xml")

    def operations(self) -> list[str]:
        """What libvirt has called hooks for since the last time."""
        return self.node.run("touch /tmp/trace; cat /tmp/trace; rm /tmp/trace").stdout.splitlines()

    def nic_files(self) -> list[str]:
        """All that the hook has written."""
        return self.node.run(
            "cd /run/kvm-ifup && find nic tap libvirt-incoming -not -type d 2>/dev/null || true"
        ).stdout.split()


@pytest.fixture
def hosts(root: Path, tmp_path: Path) -> Iterator[Hosts]:
    """Hosts that end with the test."""
    with ExitStack() as stack:
        yield Hosts(root, tmp_path, stack)


def guest(nics: str, interface: str = "<target dev='tap0'/>", name: str = "web1") -> str:
    """A guest with one interface, and *nics* in its metadata."""
    return f"""
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>64</memory>
  <metadata>
    <kvm-ifup:nics xmlns:kvm-ifup='urn:kvm-ifup:libvirt:1'>{nics}</kvm-ifup:nics>
  </metadata>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type='ethernet'>
      <mac address='{MAC}'/>
      {interface}
      <model type='virtio'/>
    </interface>
    <video><model type='none'/></video>
    <memballoon model='none'/>
  </devices>
</domain>
"""


BRIDGED = f"<kvm-ifup:nic mac='{MAC}' mode='bridged' link='br0'/>"
ROUTED = f"""
<kvm-ifup:nic mac='{MAC}' mode='routed' link='100'>
  <kvm-ifup:ip>192.0.2.8</kvm-ifup:ip>
  <kvm-ifup:ip>2001:db8::8</kvm-ifup:ip>
</kvm-ifup:nic>
"""


def bridge(host: Host) -> None:
    """A bridge."""
    host.node.run("ip link add br0 type bridge; ip link set br0 up")


def forwarding(host: Host) -> None:
    """What the administrator of a node with routed guests sets."""
    host.node.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")


@pytest.mark.parametrize(
    ("interface", "tap"),
    [
        ("", "vnet0"),
        ("<target dev='tap0'/>", "tap0"),
        (
            "<target dev='tap0'/><script path='/usr/sbin/kvm-ifup-post'/><downscript path='/usr/sbin/kvm-ifdown'/>",
            "tap0",
        ),
    ],
)
def test_a_guest_is_wired_when_it_starts_and_unwired_when_it_ends(interface: str, tap: str, hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.start(guest(BRIDGED, interface))
    assert host.operations() == ["web1 prepare begin", "web1 start begin", "web1 started begin"]
    wired(host.node, tap)
    assert host.nic_files() == ["nic/web1/0.toml", f"tap/{tap}"]
    assert host.node.run("stat -c %a:%u /run/kvm-ifup/nic/web1/0.toml").stdout == "600:0\n"
    host.virsh("destroy web1")
    assert host.operations() == ["web1 stopped end", "web1 release end"]
    assert journals(host.node) == []
    assert host.nic_files() == []


@pytest.mark.parametrize("interface", ["", "<target dev='tap0'/><script path='/usr/sbin/kvm-ifup-pre'/>"])
def test_a_routed_guest(interface: str, hosts: Hosts) -> None:
    host, neighbour = hosts.add("a"), hosts.add("b")
    uplink(host.node, neighbour.node)
    forwarding(host)
    host.start(guest(ROUTED, interface))
    tap = "tap0" if interface else "vnet0"
    assert host.node.routes(tap) == {"192.0.2.8", "2001:db8::8"}
    assert host.node.proxies() == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}
    assert host.node.rules(tap) == ["100", "100"]
    host.virsh("destroy web1")
    # The rules and the proxies would have outlived the tap.
    assert host.node.proxies() == set()
    assert host.node.rules(tap) == []
    assert journals(host.node) == []


def test_a_guest_that_cannot_be_wired_does_not_start(hosts: Hosts) -> None:
    host = hosts.add("a")
    host.define(guest(BRIDGED))
    assert "no such bridge: br0" in host.refuse("create /tmp/web1.xml")
    assert host.virsh("list --all --name").split() == []
    assert not host.node.has("tap0")
    assert host.nic_files() == []
    assert journals(host.node) == []


@pytest.mark.parametrize(
    ("nics", "complaint"),
    [
        (BRIDGED.replace("mode=", "mod="), "did you mean mode?"),
        (BRIDGED.replace("bridged", "bridget"), "mode 'bridget' is not one of"),
        (BRIDGED.replace(":01", ":02"), "there is none with this MAC"),
        (BRIDGED + BRIDGED, "twice"),
        (BRIDGED.replace("kvm-ifup:nic", "kvm-ifup:nick"), "unknown element"),
        (BRIDGED.replace("/>", "><kvm-ifup:mac/></kvm-ifup:nic>"), "unknown element"),
        (BRIDGED.replace("/>", "><kvm-ifup:rate to_gest='1mbit'/></kvm-ifup:nic>"), "did you mean to_guest?"),
        (BRIDGED.replace("/>", " filter='adress'/>"), "filter must be one of"),
    ],
)
def test_a_mistake_in_the_metadata_is_found_before_the_start(nics: str, complaint: str, hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.define(guest(nics))
    assert complaint in host.refuse("create /tmp/web1.xml")
    assert host.nic_files() == []


def test_a_guest_without_our_metadata_is_none_of_our_business(hosts: Hosts) -> None:
    host = hosts.add("a")
    host.start(guest(""))
    assert host.node.has("tap0")
    host.virsh("destroy web1")
    assert host.nic_files() == []
    assert journals(host.node) == []


def test_a_second_guest_on_the_same_tap_does_not_disturb_the_first(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.start(guest(BRIDGED))
    host.define(guest(BRIDGED.replace(":01", ":02"), name="web2").replace(MAC, "aa:00:00:35:ac:02"), "web2")
    assert "tap tap0 is that of guest 'web1'" in host.refuse("create /tmp/web2.xml")
    wired(host.node)
    assert host.nic_files() == ["nic/web1/0.toml", "tap/tap0"]


def test_what_a_crash_left_does_not_keep_a_guest_from_starting(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.node.run("mkdir -p /run/kvm-ifup/nic/web1 /run/kvm-ifup/tap; echo broken > /run/kvm-ifup/nic/web1/7.toml")
    host.node.run("ln -s ../nic/web1/7.toml /run/kvm-ifup/tap/tap7; ln -s ../nic/gone/0.toml /run/kvm-ifup/tap/tap0")
    host.start(guest(BRIDGED))
    wired(host.node)
    assert host.nic_files() == ["nic/web1/0.toml", "tap/tap0"]


def test_a_nic_that_is_added_later_has_no_hook_but_can_have_a_script(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.start(guest(BRIDGED))
    host.operations()
    host.node.run(
        """
        cat > /run/kvm-ifup/nic/web1/1.toml <<'END'
        tap = "tap1"
        mac = "aa:00:00:35:ac:02"
        mode = "bridged"
        link = "br0"
END
        cat > /tmp/nic.xml <<'END'
        <interface type='ethernet'>
          <mac address='aa:00:00:35:ac:02'/>
          <target dev='tap1'/>
          <script path='/usr/sbin/kvm-ifup-pre'/>
          <model type='virtio'/>
        </interface>
END
        """
    )
    host.virsh("attach-device web1 /tmp/nic.xml --live")
    assert host.node.ports() == {"tap0": "forwarding", "tap1": "forwarding"}
    assert host.operations() == []
    host.virsh("destroy web1")
    assert journals(host.node) == []
    assert host.nic_files() == []


def test_metadata_can_be_set_by_virsh(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.define(guest(""))
    host.virsh("define /tmp/web1.xml")
    nics = f'<nics><nic mac="{MAC}" mode="bridged" link="br0"/></nics>'
    host.virsh(f"metadata web1 --config --uri urn:kvm-ifup:libvirt:1 --key kvm-ifup --set '{nics}'")
    host.virsh("start web1")
    wired(host.node)


def test_a_restart_of_libvirtd_puts_right_what_is_wrong_and_kills_nobody(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.start(guest(BRIDGED))
    restart = "pid=$(cat /run/libvirtd.pid); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.05; done"
    restart += "; libvirtd --daemon"
    host.node.run("ip link set tap0 nomaster")
    host.operations()
    host.node.run(restart)
    host.virsh("list")
    until(host.node, "grep -q reconnect /tmp/trace")
    wired(host.node)
    # Nor when it cannot be put right.
    host.node.run("ip link del br0")
    host.node.run("rm /tmp/trace")
    host.node.run(restart)
    host.virsh("list")
    until(host.node, "grep -q reconnect /tmp/trace")
    assert host.virsh("list --name").split() == ["web1"]


def test_a_guest_from_a_file(hosts: Hosts) -> None:
    """QEMU is told "-incoming" here as well, but there is no other node."""
    host, neighbour = hosts.add("a"), hosts.add("b")
    uplink(host.node, neighbour.node)
    forwarding(host)
    host.start(guest(ROUTED))
    host.virsh("save web1 /tmp/saved")
    assert host.node.proxies() == set()
    host.virsh("restore /tmp/saved")
    assert host.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}


def migration(source: Host, target: Host) -> str:
    """Arguments of virsh for a live migration: libvirtd talks to libvirtd, QEMU to QEMU over the cable."""
    return f"migrate --live --p2p web1 'qemu+unix:///system?socket=/shared/{target.name}/libvirt-sock' tcp://192.0.2.1"


def pair(hosts: Hosts) -> tuple[Host, Host]:
    """Two hosts with a cable between them, ready for routed guests."""
    source, target = hosts.add("a"), hosts.add("b")
    uplink(source.node, target.node)
    target.node.run("ip route add default via 192.0.2.11; ip -6 route add default via 2001:db8::11")
    for host in (source, target):
        forwarding(host)
    return source, target


def test_a_live_migration_of_a_bridged_guest(hosts: Hosts) -> None:
    source, target = hosts.add("a"), hosts.add("b")
    cable(source.node, target.node)
    source.node.run("ip addr add 192.0.2.11/24 dev eth0")
    target.node.run("ip addr add 192.0.2.1/24 dev eth0")
    for host in (source, target):
        bridge(host)
    source.start(guest(BRIDGED))
    source.operations()
    source.virsh(migration(source, target))
    assert source.operations() == ["web1 stopped end", "web1 release end"]
    # There is nothing after "started", which comes before the guest does: no operation says that it runs here.
    operations = ["web1 migrate begin", "web1 prepare begin", "web1 start begin", "web1 started begin"]
    assert target.operations() == operations
    assert target.virsh("domstate web1").strip() == "running"
    wired(target.node)
    assert source.nic_files() == []
    assert journals(source.node) == []


def test_a_live_migration_of_a_routed_guest(hosts: Hosts) -> None:
    source, target = pair(hosts)
    source.start(guest(ROUTED))
    source.virsh(migration(source, target))
    assert source.node.proxies() == set()
    assert journals(source.node) == []
    # Only pre so far: when the guest has arrived, somebody has to say so.
    assert target.node.rules("tap0") == ["100", "100"]
    assert target.node.routes("tap0") == set()
    target.node.run("kvm-ifup-post --instance web1")
    assert target.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}
    assert target.node.proxies() == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}
    # And back.
    back = f"migrate --live --p2p web1 'qemu+unix:///system?socket=/shared/{source.name}/libvirt-sock' tcp://192.0.2.11"
    target.virsh(back)
    source.node.run("kvm-ifup-post --instance web1")
    assert source.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}
    assert target.node.proxies() == set()
    assert target.nic_files() == []


def test_with_the_agent_nobody_has_to_say_that_a_guest_has_arrived(hosts: Hosts) -> None:
    source, target = pair(hosts)
    for host in (source, target):
        host.node.run("kvm-ifupd >/tmp/agent 2>&1 & until grep -q ready /tmp/agent; do sleep 0.1; done")
    source.start(guest(ROUTED))
    source.virsh(migration(source, target))
    target.node.run(
        "for _ in $(seq 600); do grep -q arrived /tmp/agent && exit; sleep 0.1; done; cat /tmp/agent; false"
    )
    assert target.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}
    assert target.node.proxies() == {("eth0", "192.0.2.8"), ("eth0", "2001:db8::8")}
    assert journals(source.node) == []


def test_a_target_that_cannot_take_the_guest_refuses_before_it_moves(hosts: Hosts) -> None:
    source, target = pair(hosts)
    source.start(guest(ROUTED))
    target.node.run("sysctl -qw net.ipv4.conf.eth0.forwarding=0")
    assert "forwarding is off on uplink eth0" in source.refuse(migration(source, target))
    assert source.virsh("domstate web1").strip() == "running"
    assert source.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}
    assert target.nic_files() == []
    assert journals(target.node) == []
    # The next start there is a start like any other.
    source.virsh("destroy web1")
    target.node.run("sysctl -qw net.ipv4.conf.eth0.forwarding=1")
    target.start(guest(ROUTED))
    assert target.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}


def test_a_migration_that_was_announced_and_never_came_spoils_no_start(hosts: Hosts) -> None:
    host, neighbour = hosts.add("a"), hosts.add("b")
    uplink(host.node, neighbour.node)
    forwarding(host)
    host.define(guest(ROUTED))
    host.node.run("/etc/libvirt/hooks/qemu.d/kvm-ifup web1 migrate begin - < /tmp/web1.xml")
    assert host.nic_files() == ["libvirt-incoming/web1"]
    host.virsh("create /tmp/web1.xml")
    assert host.node.routes("tap0") == {"192.0.2.8", "2001:db8::8"}
    assert host.nic_files() == ["nic/web1/0.toml", "tap/tap0"]


def test_the_hook_writes_nothing_to_stdout_and_takes_what_it_does_not_know(hosts: Hosts) -> None:
    host = hosts.add("a")
    bridge(host)
    host.define(guest(BRIDGED))
    for operation in ("migrate begin", "prepare begin", "release end", "of-tomorrow begin"):
        done = host.node.run(f"/etc/libvirt/hooks/qemu.d/kvm-ifup web1 {operation} - < /tmp/web1.xml")
        assert done.stdout == ""
        assert done.stderr == ""
    assert host.nic_files() == []


def test_the_readme_of_the_hook_shows_the_xml_that_works(hosts: Hosts) -> None:
    text = (ROOT / "integration/libvirt/README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```xml\n(<metadata>.*?)^```", text, re.MULTILINE | re.DOTALL)
    metadata, interfaces = example.split("...\n")
    host, neighbour = hosts.add("a"), hosts.add("b")
    uplink(host.node, neighbour.node)
    forwarding(host)
    bridge(host)
    plain = guest("")
    xml = re.sub(r"<metadata>.*</metadata>", metadata, plain, flags=re.DOTALL)
    host.start(re.sub(r"<interface.*</interface>", interfaces, xml, flags=re.DOTALL))
    assert host.node.routes("vnet0") == {"192.0.2.8", "2001:db8::8"}
    assert host.node.ports() == {"vnet1": "forwarding"}


def test_the_readme_of_the_hook_lists_every_operation() -> None:
    text = (ROOT / "integration/libvirt/README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| libvirt calls.*\n(?:\|.*\n)+", text, re.MULTILINE)
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    hook = (ROOT / "integration/libvirt/kvm-ifup").read_text(encoding="utf-8")
    operations = re.findall(r'^    "(\w+)": \w+,$', hook, re.MULTILINE)
    assert re.findall(r"`(\w+) \w+`", "".join(first)) == operations
