"""The one error that reaches the user.

Everything foreseeable (bad input, a missing tool, a peer that does not answer) is raised as a
`UserError`; the command line prints it without a traceback and exits with its status.
"""

from __future__ import annotations

BAD_INPUT = 2
FAILED = 1


class UserError(Exception):
    """A fault the user can act on.

    `message` names what failed and where; `hint` is the next command to type or the thing to
    change. `status` is the exit code: 2 (`BAD_INPUT`, the default) when the request could not be
    taken and nothing was changed, 1 (`FAILED`) when it was taken and did not succeed.
    """

    def __init__(self, message: str, hint: str = "", *, status: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.status = status

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


def failure(message: str, hint: str = "") -> UserError:
    """A `UserError` for work that was begun and failed (exit code 1)."""
    return UserError(message, hint, status=FAILED)
