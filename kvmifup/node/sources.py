"""The table `inet kvm-ifup`: from which IPv6 addresses a routed guest may send, and whose nobody on an uplink may have.

The rules are the same for all guests. What is of one guest are elements of sets and maps, so that a packet does not
take longer on a node with more of them. The element of `sources` for a tap leads to the rules; its comment names what
was put into the sets for that tap, so that it can be found there without reading all.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable, Collection, Iterator, Mapping

from kvmifup.node.messages import NetlinkError, attribute, attributes, packed
from kvmifup.node.nfmessages import (
    IFNAMSIZ,
    NFPROTO_INET,
    NFT_GOTO,
    NFTA_SET_ELEM_DATA,
    NFTA_SET_ELEM_USERDATA,
    WITHOUT_TABLE,
    Element,
    Request,
    comment_of,
    commented,
    device_key,
    for_each_set,
    keyed,
    keys_of,
    nested,
    put,
    remove,
    verdict,
    verdict_of,
)
from kvmifup.node.nfnetlink import DISTURBED, Nftables, ReadOnce
from kvmifup.node.nft import TABLE
from kvmifup.node.routes import network
from kvmifup.node.source_rules import (
    ADDRESSES,
    DROPPED,
    GUESTS,
    LOOSE,
    NETWORKS,
    PARTS,
    PREFIXES,
    SOURCES,
    STRICT,
    USES,
    are_ours,
    rules_made,
)

LONGEST = 120  # characters of a comment: nft takes 128
NOTHING = "none"  # the comment for a guest without IPv6 addresses
TRIES = 5  # of a change that another one has come before
NEEDED = (SOURCES, *GUESTS.values(), *NETWORKS.values())  # while something is in one of them, so is the table
FOREIGN = "?"  # the chain, if somebody else has made another verdict of it


class SourceTable:
    """The table, through a socket of its own. Whether its rules are there is read once, until `clear`.

    *once*: so are its sets, for who asks for all guests, and only looks.
    """

    _accepted = False  # whether the kernel has taken the rules

    def __init__(self, *, once: bool = False) -> None:
        self._kernel = (ReadOnce if once else Nftables)(NFPROTO_INET, TABLE)
        self.right: bool | None = None
        self._there = self._blind = False

    def close(self) -> None:
        """Close the socket."""
        self._kernel.close()

    def clear(self) -> None:
        """Forget whether the rules are there."""
        self.right = None

    def refused(self) -> str | None:
        """Why this kernel cannot have the table, None if it can, or nobody may ask it. Nothing is changed.

        A transaction that is only tried waits for all processors (synchronize_rcu). So if there is no table, a kernel
        that has once taken the rules is not asked again: it stays the same as long as this process.
        """
        try:
            if not self._is_right() and not self._blind and (self._there or not self._accepted):
                self._kernel.change(list(rules_made()), really=False)
                SourceTable._accepted = True
        except OSError as error:
            return said(error)
        return None

    def read(self, tap: str) -> str | None:
        """From where the guest on *tap* may send: "strict 2001:db8::1 2001:db8:1::/64"; None: from anywhere.

        Raises NetlinkError.
        """
        if not self._is_right():
            return None
        found = self._led(tap)
        if found is None:
            return None
        chain, named = found
        there = self._all_of(tap) if named is None else [one for one in named if self._has(tap, one)]
        return " ".join((chain, *ordered(there)))

    def write(self, tap: str, want: str | None) -> None:
        """Make it so, in one transaction. Raises NetlinkError."""
        self.write_all({tap: want})

    def write_all(self, wanted: Mapping[str, str | None]) -> None:
        """The same for each tap of *wanted*, in one transaction for all of them."""
        # The way back to what others have made: what is in force stays, for it is closed.
        ours = {tap: want for tap, want in wanted.items() if not (want and want.startswith(FOREIGN))}
        if ours:
            self._change(
                lambda: (one for tap, want in ours.items() for one in self._due(tap, want)), makes=any(ours.values())
            )

    def read_guard(self, dev: str, prefix: str) -> bool:
        """Whether what comes in on the uplink *dev* from *prefix* is dropped. Raises NetlinkError."""
        name, element = guard(dev, prefix)
        return bool(self._is_right()) and self._kernel.element(name, element) is not None

    def write_guard(self, dev: str, prefix: str, want: bool) -> None:
        """Make it so. Raises NetlinkError."""
        name, element = guard(dev, prefix)

        def due() -> Iterator[Request]:
            if want:
                yield put(name, element)
            elif self._kernel.element(name, element) is not None:
                yield remove(name, element)

        self._change(due, makes=want)

    def _change(self, due: Callable[[], Iterator[Request]], *, makes: bool) -> None:
        """Do what is *due*. If that *makes* something, the table is made; else it goes with the last."""
        for last in [False] * TRIES + [True]:
            try:
                self._kernel.change([*([] if self._is_right() or not makes else rules_made()), *due()])
                break
            except NetlinkError as error:
                # Somebody has changed the same between reading and writing.
                if last or error.errno not in DISTURBED:
                    raise
            finally:
                self.clear()
        if not makes:
            self._tidy()

    def _tidy(self) -> None:
        """Remove the table if nobody needs it. Raises NetlinkError."""
        # That a chain is led to is cheap to see, and mostly so. It is also true of what another transaction only tries
        # to add or remove (nft --check), so it does not prove that nobody is led there.
        if any(self._kernel.uses(chain) > USES for chain in (STRICT, LOOSE)):
            return
        try:
            generation = self._kernel.generation()
            itself = self._kernel.itself()
            if itself is not None and itself[1] == PARTS and not any(map(self._kernel.elements, NEEDED)):
                self._kernel.change([WITHOUT_TABLE], generation=generation)
        except NetlinkError as error:
            if error.errno not in DISTURBED:  # somebody comes right now, or has removed it
                raise

    # --- what is there ---------------------------------------------------------------------------------------

    def _is_right(self) -> bool:
        if self.right is None:
            try:
                flags, _ = self._kernel.itself() or (None, 0)
                self._there = flags is not None
                self.right = flags == 0 and self._has_our_rules()
            except NetlinkError as error:
                # Who may change nothing may not look either. That can only be a plan: for it, nothing is there.
                if error.errno not in (errno.EPERM, errno.EACCES):
                    raise
                self.right, self._blind = False, True
        return self.right

    def _has_our_rules(self) -> bool:
        """While somebody makes or removes the table, the kernel may list some rules twice: that is looked at again."""
        if are_ours(tuple(self._kernel.rules())):
            return True
        for _ in range(TRIES):
            generation = self._kernel.generation()
            if are_ours(tuple(self._kernel.rules())):
                return True
            if self._kernel.generation() == generation:
                break
        return False

    def _led(self, tap: str) -> tuple[str, list[str] | None] | None:
        """The chain that *tap* is led to, and what its comment names; None if there is no comment."""
        found = self._kernel.element(SOURCES, keyed(device_key(tap)))
        if found is None:
            return None
        _, chain = verdict_of(found) or (0, "")
        comment = comment_of(found.get(NFTA_SET_ELEM_USERDATA, b""))
        return chain or FOREIGN, None if comment is None else [one for one in comment.split() if one != NOTHING]

    def _all_of(self, tap: str) -> list[str]:
        """All that is in the sets for *tap*: to be read whole."""
        name, found = device_key(tap), []
        for one in (*self._kernel.elements(ADDRESSES), *self._kernel.elements(PREFIXES)):
            first, last = keys_of(one)
            if first.startswith(name):
                address, end = (ipaddress.IPv6Address(key[IFNAMSIZ:]) for key in (first, last or first))
                found += [str(prefix) for prefix in ipaddress.summarize_address_range(address, end)]
        return [one.removesuffix("/128") for one in found]

    def _has(self, tap: str, source: str) -> bool:
        try:
            name, element = place(tap, source)
        except (ValueError, OSError):  # somebody else's comment
            return False
        return exactly(self._kernel.element(name, element), element)

    # --- what is to be ---------------------------------------------------------------------------------------

    def _due(self, tap: str, want: str | None) -> Iterator[Request]:
        """What makes *want* true for *tap*."""
        key = keyed(device_key(tap))
        chain, *wanted = want.split() if want else [""]
        there = self._kernel.itself() is not None
        led = self._led(tap) if there else None
        named = led[1] if led else []
        having = self._all_of(tap) if named is None else [one for one in named if self._has(tap, one)]
        lacking, over = set(wanted).difference(having), set(having).difference(wanted)
        yield from changes(put, tap, lacking)
        if led and (chain, wanted) != (led[0], led[1]):
            yield remove(SOURCES, key)
        if want and (led is None or (chain, wanted) != (led[0], led[1])):
            yield put(SOURCES, key + nested(NFTA_SET_ELEM_DATA, verdict(NFT_GOTO, chain)) + comment(wanted))
        yield from changes(remove, tap, over)
        if want:
            yield put(DROPPED, key)
        elif there and self._kernel.element(DROPPED, key) is not None:
            yield remove(DROPPED, key)


def changes(how: Callable[..., Request], tap: str, sources: Collection[str]) -> Iterator[Request]:
    """The requests that put or remove *sources* of the guest on *tap*."""
    return for_each_set(how, (place(tap, one) for one in sources))


def said(error: OSError) -> str:
    """What a refusal of the kernel means here."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"nftables table inet {TABLE} belongs to another program"
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.EPROTONOSUPPORT, errno.ENOENT):
        return f"the kernel's nftables cannot do it ({error.strerror})"
    return f"nftables: {error.strerror}"


def ordered(sources: Collection[str]) -> list[str]:
    """*sources*, as a value has them."""
    return sorted(sources, key=lambda one: (packed(one.partition("/")[0]), one))


# --- elements ----------------------------------------------------------------------------------------------------


def place(dev: str, prefix: str) -> tuple[str, bytes]:
    """The set for the source *prefix* of the guest on *dev*, and the element in it. Raises ValueError, OSError."""
    return element(dev, prefix, ADDRESSES, PREFIXES)


def guard(dev: str, prefix: str) -> tuple[str, bytes]:
    """The set for *prefix* as a source on the uplink *dev*, and the element in it."""
    family = 6 if ":" in prefix else 4
    return element(dev, prefix, GUESTS[family], NETWORKS[family])


def element(dev: str, prefix: str, single: str, wide: str) -> tuple[str, bytes]:
    """The set, *single* for a single address and else *wide*, and the element in it."""
    whole = network(prefix)
    first, last = (device_key(dev) + one.packed for one in (whole.network_address, whole.broadcast_address))
    return (single, keyed(first)) if first == last else (wide, keyed(first, last))


def exactly(found: Element | None, element: bytes) -> bool:
    """Whether what was *found* for *element* is that one; a set of intervals has one also for what is inside."""
    return found is not None and keys_of(found) == keys_of(attributes(element))


def comment(sources: Collection[str]) -> bytes:
    """The attribute of a comment that names *sources*; none if they are too many."""
    said = " ".join(sources) or NOTHING
    if len(said) > LONGEST:
        return b""
    return attribute(NFTA_SET_ELEM_USERDATA, commented(said))
