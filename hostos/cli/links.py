"""Links to images, with the key of a private one: read from a file, never from the command line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hostos.errors import UserError

MAX_LINK = 64 * 1024


def read_link(text: str) -> tuple[str, bytes | None]:
    """The reference to an image in what was typed, and the key that came with it.

    `@FILE` and `@-` (standard input: its first line, the rest is left) hold a link or a hash, with the key
    behind a `#` if the image is private. Raises UserError.
    """
    from hostos.live.private import parse_key

    if not text.startswith("@"):
        if "#" in text:
            raise UserError(
                "a key in the command line can be seen by everybody on this host",
                "put the link into a file: hostos container boot @FILE (or @- for standard input)",
            )
        return text, None
    content = _first_line() if text == "@-" else _content(Path(text[1:]))
    reference, mark, key = content.strip().partition("#")
    if not reference or "\n" in content.strip():
        raise UserError(f"{text} holds no link to an image", "hostos image link prints one")
    return reference, parse_key(key) if mark else None


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_LINK).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{path}: {reason}", "a link is read from @FILE, or from @- (standard input)") from None


def _first_line() -> str:
    """Byte by byte: what follows is the container's."""
    line = bytearray()
    while len(line) < MAX_LINK and (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


def link(image: Any, peers: tuple[str, ...], web_seeds: tuple[str, ...]) -> str:
    """A link to an image of this host; of a private one with its key. Raises UserError if that is missing."""
    from hostos.image import privacy
    from hostos.live.private import key_to_text
    from hostos.live.torrents import magnet

    made = magnet(image.hash, peers, name=image.name, web_seeds=web_seeds)
    if not any(layer.cipher for layer in image.manifest.layers):
        return made
    key = privacy.key_of(image.hash)
    if key is None:
        raise UserError(f"image {image.name} is private, and its key is not on this host", "ask whoever published it")
    return f"{made}#{key_to_text(key)}"
