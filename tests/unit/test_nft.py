"""What libnftables says, and that it is not there, as our errors."""

from __future__ import annotations

import errno
import sys

import pytest

from kvmifup.core.errors import KernelError, NotReadyError, PrivilegeError
from kvmifup.node import nft


def test_without_libnftables_the_node_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nftables", None)
    with pytest.raises(NotReadyError) as writing:
        nft.run([], "tap0")
    with pytest.raises(NotReadyError) as reading:
        nft.ask({"list": {"tables": {}}}, "tap0")
    assert {writing.value.hint, reading.value.hint} == {"`apt-get install python3-nftables`"}


@pytest.mark.parametrize(
    ("said", "kind", "number"),
    [
        ("internal:0:0-0: Error: Could not process rule: File exists\n\n", KernelError, errno.EEXIST),
        ("internal:0:0-0: Error: No such file or directory\n", KernelError, errno.ENOENT),
        ("Error: Could not process rule: Operation not supported\nadd chain", KernelError, errno.EOPNOTSUPP),
        ("netlink: Error: cache initialization failed: Operation not permitted", PrivilegeError, None),
        ("internal:0:0-0: Error: Unknown object passed to add command.", KernelError, 0),
        ("", KernelError, 0),
    ],
)
def test_what_it_prints_becomes_an_error_with_a_number(said: str, kind: type[Exception], number: int | None) -> None:
    error = nft.refused("filter of tap0", said)
    assert type(error) is kind
    assert getattr(error, "errno", None) == number
    assert str(error).startswith("filter of tap0: ")
