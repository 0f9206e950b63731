"""What goes through pyroute2, because it is not hot, or can say anything: policy rules of others, traffic control.

No other module imports pyroute2, and this one does so only inside its functions: it takes 150 ms, longer than all the
rest of a hook, and hardly ever is there such a rule in the way, or a limit.
"""

from __future__ import annotations

from typing import Any

from kvmifup.node.messages import FIB_RULE_INVERT, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, RTM_NEWRULE, failure

Attributes = list[tuple[str, Any]]


def make_again(message: bytes) -> None:
    """Make the policy rule in the RTM_NEWRULE *message* once more, whatever it says: it comes last among its equals.

    Raises NetlinkError.
    """
    from pyroute2.netlink.rtnl.fibmsg import fibmsg

    rule = fibmsg(message)
    rule.decode()
    rule["flags"] &= FIB_RULE_INVERT  # the others tell what is so at the moment, for instance that the device is gone
    request(rule, RTM_NEWRULE, NLM_F_CREATE)


def decoded(message: bytes) -> dict[str, Any]:
    """A message about a queueing discipline or a filter: its header's fields, and its attributes as plain values."""
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    found: Any = tcmsg(message)
    found.decode()
    fields: dict[str, Any] = plain(found)
    return fields


def plain(found: Any) -> Any:
    """What pyroute2 has decoded, without its classes: fields and attributes in one dictionary."""
    if not isinstance(found, dict):
        return found
    fields = {key: value for key, value in found.items() if key not in ("attrs", "header")}
    return fields | {name: plain(value) for name, value, *_ in found.get("attrs", ())}


def traffic_control(kind: int, flags: int, header: dict[str, int], attributes: Attributes) -> None:
    """Send a request about a queueing discipline or a filter. Raises NetlinkError."""
    from pyroute2.netlink.rtnl.tcmsg import tcmsg

    message: Any = tcmsg()
    for name, value in header.items():
        message[name] = value
    message["attrs"] = nested(attributes)
    request(message, kind, flags)


def nested(attributes: Attributes) -> list[list[Any]]:
    """*attributes* as pyroute2 takes them: a list of pairs inside is a nest."""
    return [[name, {"attrs": nested(value)} if isinstance(value, list) else value] for name, value in attributes]


def request(message: Any, kind: int, flags: int) -> None:
    """Send *message*, and wait until it is done. Raises NetlinkError."""
    import pyroute2

    try:
        # Without groups=0, version 0.9 subscribes to every event on the node and never reads them.
        socket_: Any = pyroute2.IPRoute(groups=0, strict_check=True)
    except TypeError:  # version 0.7 subscribes to nothing, and does not have that argument
        socket_ = pyroute2.IPRoute(strict_check=True)
    try:
        # Version 0.9's nlm_request looks for it there, and nobody sets it; before, there is no status.
        getattr(socket_, "status", {})["nlm_generator"] = True
        list(socket_.nlm_request(message, kind, NLM_F_REQUEST | NLM_F_ACK | flags))
    except pyroute2.NetlinkError as error:
        raise failure(error.code) from None
    finally:
        socket_.close()
