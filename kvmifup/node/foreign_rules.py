"""Policy rules of others, written through pyroute2, because they can say anything.

No other module imports pyroute2, and this one does so only inside its function: it takes 150 ms, longer than all the
rest of a hook, and hardly ever is there such a rule in the way.
"""

from __future__ import annotations

from typing import Any

from kvmifup.node.messages import FIB_RULE_INVERT, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, RTM_NEWRULE, failure


def make_again(message: bytes) -> None:
    """Make the policy rule in the RTM_NEWRULE *message* once more, whatever it says: it comes last among its equals.

    Raises NetlinkError.
    """
    import pyroute2
    from pyroute2.netlink.rtnl.fibmsg import fibmsg

    rule = fibmsg(message)
    rule.decode()
    rule["flags"] &= FIB_RULE_INVERT  # the others tell what is so at the moment, for instance that the device is gone
    try:
        # Without groups=0, version 0.9 subscribes to every event on the node and never reads them.
        socket_: Any = pyroute2.IPRoute(groups=0, strict_check=True)
    except TypeError:  # version 0.7 subscribes to nothing, and does not have that argument
        socket_ = pyroute2.IPRoute(strict_check=True)
    try:
        # Version 0.9's nlm_request looks for it there, and nobody sets it; before, there is no status.
        getattr(socket_, "status", {})["nlm_generator"] = True
        list(socket_.nlm_request(rule, RTM_NEWRULE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE))
    except pyroute2.NetlinkError as error:
        raise failure(error.code) from None
    finally:
        socket_.close()
