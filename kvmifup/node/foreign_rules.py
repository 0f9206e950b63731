"""Policy rules of others: read and written through pyroute2, because they can say anything.

No other module imports pyroute2, and this one does so only inside its functions: it takes 150 ms, longer than all
the rest of a hook, and few taps are named in such a rule.
"""

from __future__ import annotations

from typing import Any

from kvmifup.core.ops import Rule, Selectors
from kvmifup.node.messages import (
    FAMILIES,
    FIB_RULE_INVERT,
    FR_ACT_TO_TBL,
    NO_PREFIX_LENGTH,
    RTPROT_STATIC,
    failure,
    plain_rule,
)

# Fields of a rule's header: name, value in a plain rule, and which bits are part of the rule. The other flags
# tell what is so at the moment, for instance that the device is gone.
RULE_FIELDS = (
    ("src_len", 0, 0xFF),
    ("dst_len", 0, 0xFF),
    ("tos", 0, 0xFF),
    ("action", FR_ACT_TO_TBL, 0xFF),
    ("flags", 0, FIB_RULE_INVERT),
)


def rule_of(message: bytes, family: int, iif: str) -> Rule:
    """The policy rule in an RTM_NEWRULE message.

    What a foreign rule says beyond `iif IIF lookup TABLE` becomes its selectors; one of ours has none.
    """
    plain = plain_rule(message, RTPROT_STATIC)
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
    # Our protocol is no selector. Another one is: a foreign rule must be put back with it.
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
    """Add or remove a rule that has selectors. Raises NetlinkError."""
    import pyroute2

    try:
        # Without groups=0, version 0.9 subscribes to every event on the node and never reads them.
        socket_: Any = pyroute2.IPRoute(groups=0, strict_check=True)
    except TypeError:  # version 0.7 subscribes to nothing, and does not have that argument
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
        raise failure(error.code) from None
    finally:
        socket_.close()


def as_selectors(selectors: dict[str, str | int]) -> Selectors:
    """The selectors in order of their names, so that equal rules compare equal."""
    return tuple(sorted(selectors.items()))
