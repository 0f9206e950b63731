"""The command lines, for argparse: those of people, and of scripts that give more than a tap."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from kvmifup import __version__
from kvmifup.commands.options import HOOKS, RUN_DIR, Options, Told
from kvmifup.core.errors import NicError, UsageError
from kvmifup.core.text import shown
from kvmifup.inputs import config
from kvmifup.inputs.values import misspelt, nic_index

DOES = {
    "kvm-ifup-pre": "Wire a guest's tap as far as may be true on two nodes at once (before a live migration). "
    "For a NIC that is not incoming, go on to what kvm-ifup-post does.",
    "kvm-ifup-post": "Wire a guest's tap completely: the guest runs here (fresh start, or after a live migration).",
    "kvm-ifdown": "Undo what kvm-ifup-pre and kvm-ifup-post did for a tap. Repeating it succeeds.",
    "kvm-ifup": "Look after the NICs that the hooks wire.",
}
EPILOG = (
    "exit codes: 0 done or nothing to do, 64 usage, 65 bad NIC, 69 node not ready, 70 bug or incomplete rollback, "
    "71 refused by the kernel and rolled back, 75 busy, 77 not permitted, 78 bad configuration"
)

BEHIND = "\0"  # begins each word behind "--", also another "--": so argparse takes it for no option and for no "--"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises our errors, and writes nothing itself.

    Of several "--" argparse drops more than the first; which of them, depends on its version. A word that is dropped
    counts as not given: `nic rm web1 -- --` would be all NIC files of web1.
    """

    words: Collection[str] = ()  # its subcommands: what follows one is not for this parser

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it; but an option that there is not is named before something that is missing.

        And by this parser, not by the one above it: it knows which options there are.
        """
        try:
            found, left = super().parse_known_args(args, namespace)
        except UsageError:
            option = self._unknown(args)
            if option is None:
                raise
            raise self._no_option(option) from None
        if option := self._unknown(left):
            raise self._no_option(option)
        for one in left:
            if one != "--":
                raise UsageError(f"{shown(as_given(one))} is one argument too many", hint=f"{self.prog} --help")
        return found, []

    def _no_option(self, name: str) -> UsageError:
        """What to say of an option *name* that there is not."""
        hint = misspelt(name, self._option_string_actions) or f"{self.prog} --help"
        return UsageError(f"there is no option {shown(name)}", hint=hint)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse does it; the word that names a parser is the first one that is not "--"."""
        if action.nargs == argparse.PARSER:
            first, *more = arg_strings[1:] if arg_strings[0] == "--" else arg_strings
            arg_strings = [as_given(first), *more]
        elif action.option_strings and arg_strings == ["--"]:  # --instance=--
            arg_strings = [f"{BEHIND}--"]
        return super()._get_values(action, arg_strings)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """As argparse does it; but what is empty names nothing."""
        if action.nargs == argparse.PARSER:  # these words are for the parser below this one
            return arg_string
        word = as_given(arg_string)
        if not word and not action.choices:
            name = "/".join(action.option_strings) or action.metavar
            raise UsageError(f"{name} is empty", hint=f"is a variable not set? {self.prog} --help")
        return super()._get_value(action, word)

    def _unknown(self, args: Sequence[str]) -> str | None:
        """The first of *args* that is an option, but not one of this parser."""
        for one in args:
            if one == "--" or one in self.words:
                break
            name = one.partition("=")[0]
            if not name.startswith("-") or name == "-" or name[1].isdigit():
                continue
            flags = {name} if name.startswith("--") else {f"-{letter}" for letter in name[1:]}
            if not flags <= self._option_string_actions.keys():
                return name
        return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse does it, but with what was most likely meant."""
        if action.choices is None or value in action.choices:
            return
        if action.dest == "subcommand":
            hooks = "a tap is wired by kvm-ifup-pre and kvm-ifup-post, and taken down by kvm-ifdown; kvm-ifup --help"
            if value in ("help", "version"):
                hint = f"`{self.prog} --{value}`"
            else:
                hint = f"`{HOOKS[value]} TAP`" if value in HOOKS else misspelt(value, action.choices) or hooks
            raise UsageError(f"{shown(value)} is no subcommand", hint=hint)
        if action.dest == "phase":
            raise UsageError(f"{shown(value)} is no phase", hint=f"`{self.prog} {'|'.join(HOOKS)} INSTANCE|TAP`")
        hint = misspelt(value, action.choices) or f"one of {', '.join(action.choices)}"
        raise UsageError(f"{shown(value)} is not known here", hint=hint)

    def error(self, message: str) -> NoReturn:
        which = f"one of {', '.join(self.words)}; " if message.endswith(("SUBCOMMAND", "VERB")) else ""
        raise UsageError(message, hint=f"{which}{self.prog} --help")

    def _print_message(self, message: str, file: object = None) -> NoReturn:
        raise Told(message)


def parse(program: str, argv: Sequence[str]) -> Options:
    """The options of *program* in *argv*. Raises UsageError, and Told."""
    end = argv.index("--") + 1 if "--" in argv else len(argv)
    words = [*argv[:end], *(BEHIND + word for word in argv[end:])]
    found = parser(program).parse_args(words, Options())
    if found.node and (found.name or found.repair or found.probe):
        raise UsageError("--node excludes INSTANCE|TAP, --repair and --probe", hint="it is about all of the node")
    return found


def as_given(word: str) -> str:
    """*word* as it stands on the command line."""
    return word.removeprefix(BEHIND)


@cache
def parser(program: str) -> Parser:
    """The command line of *program*."""
    found = "; check: 1 something is wrong" if program == "kvm-ifup" else ""
    made = Parser(prog=program, description=DOES[program], epilog=EPILOG + found, allow_abbrev=False)
    if program != "kvm-ifup":
        made.add_argument("tap", nargs="?", metavar="TAP", help="the tap; default: INTERFACE from the environment")
        together = "each for itself" if program == "kvm-ifdown" else "all or none"
        made.add_argument("--instance", metavar="NAME", help=f"all NICs of this guest in one run, {together}")
        if program != "kvm-ifdown":
            made.add_argument("--announce", action="store_true", help="announce even if nothing changed")
        made.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    add_options(made)
    if program == "kvm-ifup":
        add_subcommands(made)
    return made


def add_options(made: Parser, *, again: bool = False) -> None:
    """What every command and subcommand takes. *again*: for a subcommand; what is given there wins."""

    def default(value: object) -> Any:
        return argparse.SUPPRESS if again else value

    made.add_argument("--json", action="store_true", default=default(False), help="print the outcome as JSON")
    made.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=default(0),
        help="tell on stderr what was done; twice: how long it took",
    )
    made.add_argument(
        "--config", metavar="FILE", type=Path, default=default(None), help=f"this file instead of {config.DIRECTORY}"
    )
    made.add_argument("--run-dir", metavar="DIR", type=Path, default=default(RUN_DIR), help=f"instead of {RUN_DIR}")
    made.add_argument("--version", action="version", version=f"{made.prog.split()[0]} {__version__}")


def number(text: str) -> int:
    """The number of a NIC; for argparse. Raises UsageError."""
    try:
        return nic_index(text, "INDEX")
    except NicError as error:
        raise UsageError(str(error), hint="`kvm-ifup nic list` shows those that there are") from None


# --- the command line -----------------------------------------------------------------------------------


def add_subcommands(made: Parser) -> None:
    """All that `kvm-ifup` takes after its own options."""
    subcommands = made.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    made.words = subcommands.choices

    def add(to: Any, name: str, does: str) -> Parser:
        one: Parser = to.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", allow_abbrev=False)
        add_options(one, again=True)
        return one

    one = add(subcommands, "show", "list NICs: how they are described, their phase, and whether they are wired so")
    one.add_argument("name", nargs="?", metavar="INSTANCE|TAP", help="only this guest's, or this one")
    one.add_argument("--wrong", action="store_true", help="only those with which something is wrong")
    one = add(subcommands, "plan", "print what a phase would change, and the commands to do it by hand")
    one.add_argument("phase", choices=HOOKS, metavar="|".join(HOOKS), help="the phase")
    one.add_argument("name", metavar="INSTANCE|TAP", help="all NICs of this guest, or this one")
    one = add(subcommands, "check", "compare NICs with what their phase wants; exit with 1 if something differs")
    one.add_argument("name", nargs="?", metavar="INSTANCE|TAP", help="only this guest's, or this one")
    one.add_argument("--repair", action="store_true", help="then repeat the phase that each has reached")
    one.add_argument("--probe", action="store_true", help="ask the uplinks whether somebody else has the addresses")
    one.add_argument("--node", action="store_true", help="instead: is the node ready for guests that arrive?")
    one = add(subcommands, "gc", "clear up after dead NICs and killed runs")
    one.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    add(subcommands, "expect", "for Ganeti's hooks: a guest is to move here; fail if this node cannot take it")
    one = add(subcommands, "watch", "print what hooks and the agent do, as they do it, until interrupted")
    one.add_argument("--trace", metavar="TAP", help="instead, what nftables does with each packet of this tap's guest")
    one = add(subcommands, "nic", "write, list and remove NIC files")
    verbs = one.add_subparsers(dest="verb", required=True, metavar="VERB")
    one.words = verbs.choices
    one = add(verbs, "put", "check a NIC file and put it into its place")
    one.add_argument("instance", metavar="INSTANCE", help="the guest")
    one.add_argument("index", metavar="INDEX", type=number, help="the NIC's number")
    one.add_argument("file", metavar="FILE", help='the TOML to read; "-" for standard input')
    one = add(verbs, "list", "list NIC files")
    one.add_argument("instance", metavar="INSTANCE", nargs="?", help="only this guest's")
    one = add(verbs, "rm", "remove NIC files; what is not there is as good as removed")
    one.add_argument("instance", metavar="INSTANCE", help="the guest")
    one.add_argument("index", metavar="INDEX", type=number, nargs="?", help="only the NIC with this number")
