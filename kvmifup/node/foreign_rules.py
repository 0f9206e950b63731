"""Policy rules of others, which can say anything: through pyroute2."""

from __future__ import annotations

from typing import Any

from kvmifup.core.ops import Rule, Selectors
from kvmifup.node import messages
from kvmifup.node.messages import FAMILIES, RTPROT_STATIC

FR_ACT_TO_TBL, FIB_RULE_INVERT = 1, 0x2  # linux/fib_rules.h
# Of a rule's header: field, value in a plain rule, bits that belong to the rule. The other flags tell of
# the moment, such as that the device is gone.
RULE_FIELDS = (
    ("src_len", 0, 0xFF),
    ("dst_len", 0, 0xFF),
    ("tos", 0, 0xFF),
    ("action", FR_ACT_TO_TBL, 0xFF),
    ("flags", 0, FIB_RULE_INVERT),
)
NO_PREFIX_LENGTH = 0xFFFFFFFF  # an unset FRA_SUPPRESS_PREFIXLEN


# --- policy rules -----------------------------------------------------------------------------------------


def rule_of(message: bytes, family: int, iif: str) -> Rule:
    """The policy rule in a netlink message, with all that tells it from `iif X lookup T`."""
    plain = messages.plain_rule(message, RTPROT_STATIC)
    if plain is not None:
        return Rule(family, iif, *plain, selectors=(), want=True)

    from pyroute2.netlink.rtnl.fibmsg import fibmsg

    found = fibmsg(message)
    found.decode()
    selectors: dict[str, str | int] = {}
    for field, usual, mask in RULE_FIELDS:
        if found[field] & mask != usual:
            selectors[field] = found[field] & mask
    for name, value in found["attrs"]:
        known = name in ("FRA_TABLE", "FRA_PRIORITY", "FRA_IIFNAME", "FRA_PROTOCOL")
        unset = name == "FRA_SUPPRESS_PREFIXLEN" and value == NO_PREFIX_LENGTH
        if not known and not unset and isinstance(value, str | int):
            selectors[name.removeprefix("FRA_").lower()] = value
    # A rule of ours is known by its target alone; a foreign one keeps who made it, to be put back whole.
    protocol = found.get_attr("FRA_PROTOCOL")
    if protocol not in (None, RTPROT_STATIC):
        selectors["protocol"] = protocol
    return Rule(
        family=family,
        iif=iif,
        table=found.get_attr("FRA_TABLE") or found["table"],
        priority=found.get_attr("FRA_PRIORITY") or 0,
        selectors=as_selectors(selectors),
        want=True,
    )


def write_foreign_rule(op: Rule) -> None:
    """Add or remove a rule that says more than ours do. Raises NetlinkError."""
    import pyroute2

    try:
        # Without groups=0, 0.9 subscribes to every event on the node and never reads them.
        socket_: Any = pyroute2.IPRoute(groups=0, strict_check=True)
    except TypeError:  # 0.7: subscribes to nothing, and knows no such argument
        socket_ = pyroute2.IPRoute(strict_check=True)
    try:
        socket_.rule(
            "add" if op.want else "del",
            family=FAMILIES[op.family],
            iifname=op.iif,
            table=op.table,
            priority=op.priority,
            **dict(op.selectors),
        )
    except pyroute2.NetlinkError as error:
        raise messages.failure(error.code) from None
    finally:
        socket_.close()


def as_selectors(selectors: dict[str, str | int]) -> Selectors:
    """In one order, so that equal rules compare equal."""
    return tuple(sorted(selectors.items()))
