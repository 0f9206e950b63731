"""Read and validate the administrator's TOML: /etc/kvm-ifup/config.toml, then conf.d/*.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvmifup.core.errors import ConfigError, NicError
from kvmifup.core.model import (
    AgentConfig,
    BridgedConfig,
    Config,
    ExtConfig,
    ExtNetwork,
    LinkConfig,
    RoutedConfig,
    TapConfig,
)
from kvmifup.core.text import as_told, shown
from kvmifup.inputs import toml, trust
from kvmifup.inputs.values import LADDER, Check, device, nearest, routing_table, yes_or_no

DIRECTORY = Path("/etc/kvm-ifup")
MAX_SECONDS = 3600
EXT_MODES = ("bridged", "routed", "openvswitch")
RP_FILTERS = ("strict", "loose", "off", "keep")


def load(file: Path | None) -> Config:
    """The configuration in *file* alone, or in the standard places; the defaults where nothing is set.

    Raises ConfigError for a file that is wrong, not to be trusted, or (if named) missing.
    """
    if file is not None:
        return merged(Config(), file, file.parent)
    config = Config()
    for path in (DIRECTORY / "config.toml", *trust.listed(DIRECTORY / "conf.d", ".toml")):
        if path.exists() or path.is_symlink():
            config = merged(config, path, DIRECTORY)
    return config


def merged(config: Config, path: Path, base: Path) -> Config:
    """*config* with what *path* sets. Raises ConfigError."""
    try:
        return parsed(config, trust.read(path, base))
    except trust.Untrusted as error:
        raise ConfigError(f"not to be trusted: {error}", hint=error.mend, where=str(path)) from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        hint = 'words need quotes, as in key = "word"; see kvm-ifup.toml(5)'
        raise ConfigError(f"not TOML: {as_told(error)}", hint=hint, where=str(path)) from None
    except PermissionError:
        raise
    except OSError as error:
        trust.need_answer(error)
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (ConfigError, NicError) as error:
        raise ConfigError(str(error), hint=error.hint, where=str(path)) from None


@lru_cache(maxsize=16)
def parsed(config: Config, text: str) -> Config:
    """*config* with what the TOML *text* sets; the agent reads the same text for every hook. Raises ConfigError."""
    changed: Config = section(config, toml.loads(text), "")
    return changed


def section(current: Any, data: Mapping[str, Any], name: str) -> Any:
    """The frozen settings *current* with the keys of *data* set. Raises ConfigError, naming the key."""
    known = [
        f.name
        for f in fields(current)
        if (type(current), f.name) in CHECKS or is_dataclass(getattr(current, f.name)) or isinstance(current, Config)
    ]
    changes: dict[str, Any] = {}
    for key, value in data.items():
        full = f"{name}.{key}" if name else key
        if key not in known and not (isinstance(current, ExtConfig) and isinstance(value, dict)):
            raise ConfigError(f"unknown key {shown(full)}", hint=elsewhere(key, name) or nearest(key, known))
        inner = getattr(current, key, None)
        if isinstance(current, ExtConfig) and isinstance(value, dict):
            changes["networks"] = (*changes.get("networks", current.networks), (key, ext_network(full, value)))
        elif isinstance(current, Config) and key == "link":
            changes[key] = links(current, value)
        elif is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(f"{full} must be a table", hint=f"[{full}]")
            changes[key] = section(inner, value, full)
        else:
            changes[key] = CHECKS[type(current), key](full, value)
    return replace(current, **changes)


def links(current: Config, data: Any) -> tuple[tuple[str, LinkConfig], ...]:
    """`[link.NAME]`: what *data* sets, and what *current* has beside it. Raises ConfigError, NicError."""
    if not isinstance(data, dict) or not all(isinstance(one, dict) for one in data.values()):
        raise ConfigError("link must have a table for each link", hint="[link.br0]")
    found = dict(current.link)
    for name, value in data.items():
        full = f"link.{link_name(name)}"
        found[name] = section(current.of_link(name), value, full)
    return tuple(found.items())


def link_name(name: str) -> str:
    """*name*, if a NIC can have it as its link. Raises NicError."""
    try:
        return device(name, "link")
    except NicError:  # the name of a routing table may be longer
        if len(name) <= 15:
            raise
        return routing_table(name)


def elsewhere(key: str, name: str) -> str:
    """A hint that names the sections where *key*, which the section *name* does not have, belongs; or empty."""
    places = [f"[{one.name}]" for one in fields(Config) if (type(one.default), key) in CHECKS and one.name != name]
    places += ["[link.NAME]"] if (LinkConfig, key) in CHECKS and not name.startswith("link.") else []
    if places:
        return f"it belongs below {' or '.join(places)}"
    return "it belongs above all sections" if name and (Config, key) in CHECKS else ""


def seconds(key: str, value: Any, most: int = MAX_SECONDS) -> float:
    """A time limit in seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ConfigError(f"{key} must be a number of seconds from 0 to {most}")
    return float(value)


def hours(key: str, value: Any) -> float:
    """A time limit in seconds that may be as long as a day."""
    return seconds(key, value, 86400)


def uplinks(key: str, value: Any) -> tuple[str, ...]:
    """A list of device names, each once; empty for none."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{key} must be a list of device names", hint='like ["eth0"]')
    if len(set(value)) != len(value):
        raise ConfigError(f"{key} names a device twice")
    return tuple(device(one, key) for one in value)


def rule_priority(key: str, value: Any) -> int:
    """A priority before those of the tables main and default (32766, 32767), which would win otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 32765:
        raise ConfigError(f"{key} must be a whole number from 1 to 32765")
    return value


def rp_filter(key: str, value: Any) -> str:
    """A name for the kernel's number, or "keep"."""
    if not isinstance(value, str) or value not in RP_FILTERS:
        raise ConfigError(f"{key} must be one of {', '.join(RP_FILTERS)}")
    return value


def ext_network(key: str, data: Mapping[str, Any]) -> ExtNetwork:
    """`[ext.NAME]`: mode, and the link that the mode needs."""
    for name in data:
        if name not in ("mode", "link"):
            raise ConfigError(f"unknown key {shown(f'{key}.{name}')}", hint="the keys are mode, link")
    mode, link = data.get("mode"), data.get("link")
    if mode not in EXT_MODES:
        raise ConfigError(f"{key}.mode must be one of {', '.join(EXT_MODES)}")
    if link is None and mode == "routed":
        return ExtNetwork(mode, None)
    if not isinstance(link, str):
        raise ConfigError(f"{key}.link must be a string", hint='like link = "br0"')
    return ExtNetwork(mode, routing_table(link) if mode == "routed" else device(link, f"{key}.link"))


CHECKS: dict[tuple[type[Any], str], Check] = {
    (Config, "lock_timeout"): seconds,
    (BridgedConfig, "forwarding_timeout"): seconds,
    (LinkConfig, "uplinks"): uplinks,
    (RoutedConfig, "uplinks"): uplinks,
    (RoutedConfig, "rule_priority"): rule_priority,
    (RoutedConfig, "rp_filter"): rp_filter,
    (RoutedConfig, "guard_uplinks"): yes_or_no,
    (ExtConfig, "timeout"): seconds,
    (AgentConfig, "arrival_timeout"): hours,
    (AgentConfig, "withdraw"): yes_or_no,
    (AgentConfig, "mend"): yes_or_no,
    (AgentConfig, "idle_exit"): hours,
    **{
        (kind, key): check
        for kind in (BridgedConfig, RoutedConfig, TapConfig, LinkConfig)
        for key, (_, check) in LADDER.items()
        if hasattr(kind, key)
    },
}
