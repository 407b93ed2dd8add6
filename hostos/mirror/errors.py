"""What is answered instead of a file."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that gets no file. `status`: the HTTP status; `reason`: for the person at the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class UnverifiedError(RefusedError):
    """Something arrived that isn't what was signed (or isn't signed): never served, never kept."""

    def __init__(self, reason: str) -> None:
        super().__init__(502, reason)


class UnreachableError(RefusedError):
    """An upstream that doesn't answer, or answers with an error of its own."""

    def __init__(self, reason: str, status: int = 504) -> None:
        super().__init__(status, reason)


class MissingError(RefusedError):
    """It isn't there: the upstream says 404, or nothing signed lists it."""

    def __init__(self, reason: str) -> None:
        super().__init__(404, reason)
