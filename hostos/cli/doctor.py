"""hostos doctor: is everything there that a start needs?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from hostos.findings import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}


@click.command()
@click.option("--os", "os_dir", metavar="DIR", help="OS build to check.  [default: as for hostos up]")
@click.option("--proof/--no-proof", default=True, help="Start a throw-away guest under each accelerator (default).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for programs.")
def doctor(os_dir: str | None, proof: bool, as_json: bool) -> int:
    """Check everything a start needs, and say how to mend what is wrong.

    One line each. A fault keeps machines from starting (exit code 1); a warning keeps something
    from working, or from working well. What it finds out about KVM is remembered for hostos up.
    """
    from hostos.image import doctor as images
    from hostos.machine import doctor as machines

    found: list[Finding] = []
    sources = (machines.findings(Path(os_dir).expanduser() if os_dir else None, prove=proof), images.findings())
    for source in sources:
        for finding in source:
            found.append(finding)
            if not as_json:
                _show(finding)
    faults = sum(finding.level == "fault" for finding in found)
    if as_json:
        click.echo(
            json.dumps({"schema": 1, "ok": not faults, "findings": [asdict(finding) for finding in found]}, indent=2)
        )
    elif faults:
        click.echo(f"{faults} fault{'s' if faults > 1 else ''}: machines do not start", err=True)
    return 1 if faults else 0


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level:<8}", fg=_COLOURS[finding.level])
    click.echo(f"{level} {finding.name:<14} {finding.says}")
    if finding.fix:
        click.echo(f"{'':<8} {'':<14} -> {finding.fix}")
