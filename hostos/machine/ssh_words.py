"""What of a command line is for ssh and what is the guest's (ssh(1))."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hostos.errors import UserError

# ssh(1), OpenSSH 9 and 10. -m is ours (`-o MACs=` is the same), -F would undo what we are for.
_FLAGS = frozenset("46AaCfGgKkMNnqsTtVvXxYy")
_WITH_VALUE = frozenset("BbcDEeIiJLlOoPpQRSWw")


@dataclass(frozen=True)
class SshWords:
    """`options` for ssh itself, `command` for the guest; `machine` if one was named."""

    machine: str | None
    options: tuple[str, ...]
    command: tuple[str, ...]
    help: bool = False

    @property
    def forwards_agent(self) -> bool:
        return any(_asks_for_agent(word) for word in self.options)


def split(words: Sequence[str]) -> SshWords:
    """`[-m MACHINE] [SSH OPTION…] [--] [COMMAND…]`; options end at the first word that is none.

    Flags may be clustered (`-NL 8080:localhost:80`), values attached (`-L8080:…`). Raises UserError.
    """
    machine: str | None = None
    options: list[str] = []
    left = list(words)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        if word in ("-h", "--help"):
            return SshWords(machine, (), (), help=True)
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            if name != "--machine":
                raise UserError(
                    f"{name} is not an option of hostos ssh", "ssh's own options are single letters: ssh(1)"
                )
            machine = value if equals else _value(word, left)
        elif word.startswith("-m"):
            machine = word[2:] or _value("-m", left)
        else:
            options.append(word)
            letter = _letter_with_value(word)
            if letter and word.endswith(letter):
                options.append(_value(f"-{letter}", left))
    return SshWords(machine, tuple(options), tuple(left))


def _letter_with_value(word: str) -> str:
    """The letter in a cluster that takes the rest of it, or the next word, as its value; "" if none."""
    for place, letter in enumerate(word[1:], 1):
        if letter in _WITH_VALUE:
            return letter if place == len(word) - 1 else ""
        if letter == "F":
            raise UserError("-F would replace what hostos gives to ssh", "run ssh -F FILE yourself (hostos ssh-config)")
        if letter not in _FLAGS:
            raise UserError(f"-{letter} is not an option of ssh", "a command that begins with -: hostos ssh -- -x")
    return ""


def _asks_for_agent(word: str) -> bool:
    if re.fullmatch(r"(-\w*o)?\s*forwardagent\s*[= ]\s*(?!no\b).*", word, re.IGNORECASE):
        return True
    return re.match(rf"-[{''.join(_FLAGS - {'A'})}]*A", word) is not None


def _value(option: str, left: list[str]) -> str:
    if not left:
        raise UserError(f"{option} needs a value", "hostos ssh --help")
    return left.pop(0)
