"""What netlink and /proc refuse, as our errors."""

from __future__ import annotations

import errno
import os

from kvmifup.core.errors import KernelError, PrivilegeError, VanishedError
from kvmifup.node.messages import NetlinkError

# --- errors -------------------------------------------------------------------------------------------


class refusals:  # noqa: N801 (a context manager reads as a function)
    """Turn what netlink and /proc/sys raise inside into our errors about *what*."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, NetlinkError):
            raise refusal(self.what, error.errno or 0) from None
        if isinstance(error, OSError) and error.errno is not None:
            raise refusal(self.what, errno.ENODEV if error.errno == errno.ENOENT else error.errno) from None


class forgiven:  # noqa: N801
    """Let the netlink error *code* pass: what was asked for is already so."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        return isinstance(error, NetlinkError) and error.errno == self.code


def refusal(what: str, number: int) -> KernelError | PrivilegeError:
    """The error for errno *number*."""
    if number in (errno.ENODEV, errno.ENXIO):
        return VanishedError(f"{what}: the device is not there", errno=number)
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what}: not permitted", hint="this takes root (CAP_NET_ADMIN)")
    return KernelError(f"{what}: {os.strerror(number)}", errno=number)
