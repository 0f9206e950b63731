"""What the kernel refuses, by netlink or in /proc and /sys, as errors of `kvmifup.core.errors`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from kvmifup.core.errors import KernelError, PrivilegeError, VanishedError
from kvmifup.node.messages import NetlinkError


class refusals:  # noqa: N801 (a context manager reads as a function)
    """A context manager: OSError and NetlinkError inside it become the error that `refusal` makes, about *what*.

    That is a text, or what gives one: it is only wanted after a failure.
    """

    def __init__(self, what: str | Callable[[], str]) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not isinstance(error, OSError):  # which a NetlinkError is, too
            return
        what = self.what if isinstance(self.what, str) else self.what()
        if isinstance(error, NetlinkError):
            raise refusal(what, error.errno or 0) from None
        if error.errno is not None:
            # A sysctl that is not there belongs to a device that is gone.
            raise refusal(what, errno.ENODEV if error.errno == errno.ENOENT else error.errno) from None


class forgiven:  # noqa: N801 (likewise)
    """A context manager: NetlinkError with the errno *code* inside it counts as success.

    The kernel reports with it that what was asked for is already so.
    """

    def __init__(self, code: int) -> None:
        self.code = code

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        return isinstance(error, NetlinkError) and error.errno == self.code


def refusal(what: str, number: int) -> KernelError | PrivilegeError:
    """The error for errno *number*; *what* says what was being done.

    VanishedError if the device is not there, PrivilegeError without CAP_NET_ADMIN, KernelError for all else.
    """
    if number in (errno.ENODEV, errno.ENXIO):
        return VanishedError(f"{what}: the device is not there", errno=number)
    if number in (errno.EPERM, errno.EACCES):
        return PrivilegeError(f"{what}: not permitted", hint="this takes root (CAP_NET_ADMIN)")
    return KernelError(f"{what}: {os.strerror(number)}", errno=number)
