"""What filters packets on their way through this node: nftables and both kinds of iptables, read as one kind of rules.

Nothing is changed, and nothing that is not installed is asked for. What a rule says that is not understood here becomes
a test whose result is unknown, so that nobody takes it for a drop or for an accept.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

from kvmifup.core.errors import ProgramError
from kvmifup.core.records import record
from kvmifup.node import programs
from kvmifup.node.procfs import read_file

TIMEOUT = 5.0  # seconds
OURS = "kvm-ifup"  # the name of our own tables
HOOKS = {"PREROUTING": "prerouting", "FORWARD": "forward", "POSTROUTING": "postrouting"}
# What a statement of nftables is that decides nothing and asks for nothing.
HARMLESS = {"counter", "log", "mangle", "notrack", "set", "map", "comment", "flow", "ct helper", "continue"}
META = {"iifname": "iif", "iif": "iif", "oifname": "oif", "oif": "oif", "l4proto": "protocol", "nfproto": "family"}
FAMILIES = {"ipv4": "4", "ipv6": "6", "ip": "4", "ip6": "6"}


@record
class Test:
    """What a rule asks of a packet: whether *about* is one of *values*, or, *negated*, none of them.

    *about* is iif, oif, source, target, protocol, family, state, status, port_in, port_out, or "" for what is not
    understood.
    """

    about: str
    values: tuple[str, ...] = ()
    negated: bool = False


@record
class Rule:
    """Tests, and what becomes of a packet that passes all of them.

    *verdict* is accept, drop, return, jump, goto, "" for nothing, or "?" for what is not understood. *text* is for
    people. *opaque*: nft cannot tell all that it says.
    """

    tests: tuple[Test, ...]
    verdict: str
    target: str = ""
    text: str = ""
    opaque: bool = False


@record
class Chain:
    """A chain of *table*, read by *program*; *family* is ip, ip6, inet or bridge. *hook* is None if it is jumped to."""

    program: str
    family: str
    table: str
    name: str
    hook: str | None
    policy: str
    rules: tuple[Rule, ...]


Chains = dict[tuple[str, str, str, str], Chain]  # by program, family, table, name


def chains() -> Chains:
    """All chains of this network namespace that can be read; none where nothing is installed to read them."""
    found: list[Chain] = []
    ruleset = output("nft", "-j", "list", "ruleset")
    if ruleset is not None:
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # another nft, which nobody has seen yet
            found += list(nft_chains(ruleset))
    # What iptables has put into nftables in a way of its own, only iptables can tell.
    for program, family in (("iptables-nft", "ip"), ("ip6tables-nft", "ip6")):
        tables = {one.table for one in found if one.family == family and of_iptables(one)}
        for table in sorted(tables):
            saved = output(f"{program}-save", "-t", table)
            if saved is not None:
                found = [one for one in found if (one.family, one.table) != (family, table)]
                found += saved_chains(saved, program, family)
    for program, family, names in (
        ("iptables-legacy", "ip", "/proc/net/ip_tables_names"),
        ("ip6tables-legacy", "ip6", "/proc/net/ip6_tables_names"),
    ):
        for table in (read_file(names) or "").split():  # only what is there: to ask for another one would make it
            saved = output(f"{program}-save", "-t", table)
            if saved is not None:
                found += saved_chains(saved, program, family)
    return {(one.program, one.family, one.table, one.name): one for one in found if one.table != OURS}


def output(*argv: str) -> str | None:
    """What a program prints; None if it is not installed, fails or does not end."""
    try:
        result = programs.run(argv, {}, TIMEOUT)
    except ProgramError:
        return None
    return result.output if result.code == 0 else None


def of_iptables(chain: Chain) -> bool:
    """Whether *chain* was made by iptables; nft does not understand all of its rules then."""
    return chain.name in HOOKS or any(rule.opaque for rule in chain.rules)


# --- nftables -----------------------------------------------------------------------------------------------


def nft_chains(text: str) -> Iterator[Chain]:
    """The chains in what `nft -j list ruleset` prints."""
    things = json.loads(text)["nftables"]
    sets: dict[tuple[str, str, str], list[Any]] = {}
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    for thing in things:
        for kind in ("set", "map"):
            if kind in thing:
                one = thing[kind]
                sets[one["family"], one["table"], one["name"]] = one.get("elem", [])
    for thing in things:
        if "rule" in thing:
            one = thing["rule"]
            named = {name: elements for (*place, name), elements in sets.items() if tuple(place) == where(one)}
            rules.setdefault((*where(one), one["chain"]), []).extend(nft_rules(one, named))
    for thing in things:
        one = thing.get("chain")
        if one and one.get("type") != "nat":
            found = tuple(rules.get((*where(one), one["name"]), ()))
            yield Chain("nft", *where(one), one["name"], one.get("hook"), one.get("policy", "accept"), found)


def where(thing: Mapping[str, Any]) -> tuple[str, str]:
    """Family and table of a chain, rule or set."""
    return thing["family"], thing["table"]


def nft_rules(rule: Mapping[str, Any], named: Mapping[str, list[Any]]) -> Iterator[Rule]:
    """A rule of nftables; one with a map of verdicts is a rule for each of the map's elements."""
    tests: list[Test] = []
    text = f"rule {rule.get('handle')} of chain {rule['chain']}"
    for statement in rule.get("expr", ()):
        kind, value = only(statement)
        if kind == "match":
            tests.append(nft_test(value, named))
        elif kind in ("accept", "drop", "return"):
            yield Rule(tuple(tests), kind, text=text)
        elif kind == "reject":
            yield Rule(tuple(tests), "drop", text=text)
        elif kind in ("jump", "goto"):
            yield Rule(tuple(tests), kind, value["target"], text)
        elif kind == "vmap":
            yield from nft_map(value, named, tests, text)
        elif kind == "xt":
            name = (value or {}).get("name")
            yield Rule(tuple(tests), "drop" if name == "REJECT" else "", text=text, opaque=name != "comment")
            if name != "comment":
                tests.append(Test(""))
        elif kind == "queue":
            yield Rule(tuple(tests), "?", text=text)
        elif kind not in HARMLESS:
            tests.append(Test(""))


def only(thing: Any) -> tuple[str, Any]:
    """The one key of an object, and what it has; ("?", {}) for anything else."""
    return next(iter(thing.items())) if isinstance(thing, dict) and len(thing) == 1 else ("?", {})


def nft_map(
    value: Mapping[str, Any], named: Mapping[str, list[Any]], tests: Sequence[Test], text: str
) -> Iterator[Rule]:
    """A map from something of the packet to verdicts."""
    data = value.get("data")
    elements = named.get(data[1:], []) if isinstance(data, str) else (data or {}).get("set", [])
    for key, verdict in (one for one in elements if isinstance(one, list) and len(one) == 2):
        test = nft_test({"op": "==", "left": value["key"], "right": key}, named)
        kind, target = only(verdict)
        yield Rule((*tests, test), kind, (target or {}).get("target", ""), text)


def nft_test(match: Mapping[str, Any], named: Mapping[str, list[Any]]) -> Test:
    """What a "match" asks."""
    kind, what = only(match["left"])
    about = ""
    if kind == "meta":
        about = META.get(what.get("key", ""), "")
    elif kind == "payload" and what.get("protocol") in ("ip", "ip6"):
        about = {"saddr": "source", "daddr": "target"}.get(what.get("field"), "")
    elif kind == "ct" and what.get("key") in ("state", "status"):
        about = what["key"]
    values = list(nft_values(match["right"], named))
    if about == "family":
        values = [FAMILIES.get(one or "", one) for one in values]
    understood = about and None not in values and match["op"] in ("==", "!=", "in")
    return Test(about, tuple(map(str, values)), match["op"] == "!=") if understood else Test("")


def nft_values(right: Any, named: Mapping[str, list[Any]]) -> Iterator[str | None]:
    """The values on the right of a "match"; None for one that is not understood."""
    if isinstance(right, str) and right.startswith("@"):
        yield from nft_values(named.get(right[1:]), named)
    elif isinstance(right, str | int):
        yield str(right)
    elif isinstance(right, list):
        for one in right:
            yield from nft_values(one, named)
    elif isinstance(right, dict) and "set" in right:
        yield from nft_values(right["set"], named)
    elif isinstance(right, dict) and "elem" in right:
        yield from nft_values(right["elem"]["val"], named)
    elif isinstance(right, dict) and "prefix" in right:
        yield f"{right['prefix']['addr']}/{right['prefix']['len']}"
    elif isinstance(right, dict) and "range" in right:
        yield "-".join(map(str, right["range"]))
    else:
        yield None


# --- iptables -----------------------------------------------------------------------------------------------

OPTIONS = {
    **{"-i": "iif", "-o": "oif", "-s": "source", "-d": "target", "-p": "protocol"},
    **{
        "--physdev-in": "port_in",
        "--physdev-out": "port_out",
        "--ctstate": "state",
        "--state": "state",
        "--ctstatus": "status",
    },
}
TERMINATING = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}
# Targets after which the next rule comes.
PASSING = {"LOG", "NFLOG", "MARK", "CONNMARK", "TCPMSS", "CHECKSUM", "CT", "TRACE", "DSCP", "TTL", "HL", "CLASSIFY"}
LOWER = {"--ctstate", "--state", "--ctstatus", "-p"}


def saved_chains(text: str, program: str, family: str) -> Iterator[Chain]:
    """The chains of one table in what `iptables-save` prints."""
    table, policies, rules = "", dict[str, str](), dict[str, list[Rule]]()
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy, *_ = line[1:].split()
            policies[name] = policy
        elif line.startswith("-A "):
            _, chain, *words = shlex.split(line)
            rules.setdefault(chain, []).append(saved_rule(words, line, policies))
    if table == "nat":
        return
    for name, policy in policies.items():
        hook = HOOKS.get(name) if policy != "-" else None
        policy = "drop" if policy == "DROP" else "accept"
        yield Chain(program, family, table, name, hook, policy, tuple(rules.get(name, ())))


def saved_rule(words: Sequence[str], line: str, chains: Mapping[str, str]) -> Rule:
    """A rule of iptables, from its words behind "-A CHAIN"."""
    tests: list[Test] = []
    verdict, target, negated = "", "", False
    position = 0
    while position < len(words):
        word = words[position]
        values = list(takewhile(lambda one: not one.startswith(("-", "!")), words[position + 1 :]))
        position += 1 + len(values)
        if word == "!":
            negated = True
            continue
        if word in ("-j", "-g"):
            target = values[0]
            verdict = TERMINATING.get(target, "")
            if target in chains:
                verdict = "goto" if word == "-g" else "jump"
            elif not verdict and target not in PASSING:
                verdict = "?"
            break  # what follows are the target's own options
        if word in OPTIONS and values:
            given = [value[:-1] + "*" if value.endswith("+") else value for value in values[0].split(",")]
            given = [value.lower() for value in given] if word in LOWER else given
            tests.append(Test(OPTIONS[word], tuple(given), negated))
        elif word == "--physdev-is-bridged":
            tests.append(Test("port_out", ("*",), negated))
        elif word not in ("-m", "--comment"):
            tests.append(Test(""))
        negated = False
    return Rule(tuple(tests), verdict, target, line)
