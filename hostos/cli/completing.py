"""What Tab offers: names of machines and images, found without asking anybody.

It runs at every Tab, so nothing heavy is imported; whatever cannot be read offers nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress

import click
from click.shell_completion import CompletionItem

from hostos.paths import data_dir, state_dir


def machines(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    with suppress(OSError):
        found = sorted(path.name for path in (state_dir() / "machines").iterdir() if path.is_dir())
        return [name for name in found if name.startswith(incomplete)]
    return []


def images(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of the images of the store; hashes once somebody began to type one."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for directory in sorted((data_dir() / "images").iterdir()):
            with suppress(OSError, ValueError, AttributeError):
                name = json.loads((directory / "manifest.json").read_bytes()).get("name")
                if name:
                    found[str(name)] = directory.name[:16]
                if incomplete:
                    found[directory.name] = str(name or "")
    return [CompletionItem(word, help=more) for word, more in found.items() if word.startswith(incomplete)]
