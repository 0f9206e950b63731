"""What a process manager or an administrator leaves for the hooks: NIC files, an environment, a configuration."""

from __future__ import annotations

import json
import stat
from pathlib import Path

from harness.addresses import GUEST_MAC

RUN_DIR = Path("/run/kvm-ifup")


def write_nic(
    tap: str = "tap0", instance: str = "web1.example.com", index: int = 0, *, run_dir: Path = RUN_DIR, **keys: object
) -> Path:
    """A NIC file as a process manager writes it, with the symlink that finds it by its tap."""
    values = {"tap": tap, "mac": GUEST_MAC, **{key: value for key, value in keys.items() if value is not None}}
    file = run_dir / "nic" / instance / f"{index}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    file.chmod(stat.S_IRUSR | stat.S_IWUSR)
    shortcut = run_dir / "tap" / tap
    shortcut.parent.mkdir(exist_ok=True)
    shortcut.unlink(missing_ok=True)
    shortcut.symlink_to(f"../nic/{instance}/{index}.toml")
    return file


def toml(value: object) -> str:
    """*value* in TOML. JSON's strings, numbers, lists and booleans are the same there."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def ganeti(tap: str = "tap0", **more: str) -> dict[str, str]:
    """The environment of a hook, as Ganeti's node daemon makes it."""
    return {
        "INSTANCE": "web1.example.com",
        "MAC": GUEST_MAC,
        "INTERFACE": tap,
        "INTERFACE_INDEX": "0",
        "INTERFACE_UUID": "1f0b7c5e-6f86-4f19-8d0c-6a7c1c3c7a51",
        "TAGS": "",
        "VLAN": "",
        **more,
    }


def configuration(**settings: object) -> str:
    """`--config=FILE` for *settings*; a dictionary is a section."""
    lines = [f"{key} = {toml(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, section in settings.items():
        if isinstance(section, dict):
            lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in section.items())]
    file = Path("/run/etc/config.toml")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return f"--config={file}"
