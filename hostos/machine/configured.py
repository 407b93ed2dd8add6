"""What config.toml says about machines, as the types they are made of."""

from __future__ import annotations

from hostos import config
from hostos.errors import UserError
from hostos.machine.accel import FIRST_OUTPUT_SECONDS
from hostos.machine.keys import read_public_keys
from hostos.machine.options import UpOptions
from hostos.machine.readiness import Deadlines


def up_options() -> UpOptions:
    """Defaults for what neither the command nor the machine's last start says; raises UserError."""
    settings = config.load()
    os_directory = settings.get("machine.os")
    try:
        lines = [key.line for name in settings.get("machine.keys", ()) for key in read_public_keys(config.expand(name))]
    except UserError as error:
        raise UserError(f"machine.keys in {config.path()}: {error.message}", error.hint) from None
    return UpOptions(
        keys=tuple(dict.fromkeys(lines)) or None,
        memory_mib=settings.get("machine.memory"),
        cpus=settings.get("machine.cpus"),
        os=config.expand(os_directory) if os_directory else None,
        arch=settings.get("machine.arch"),
        accel=settings.get("machine.accel"),
    )


def warm() -> bool:
    """Whether machines start from templates where they can; raises UserError."""
    return bool(config.get("machine.start") == "auto")


def deadlines(*, proof: bool, total: float | None) -> Deadlines:
    """How long each rung of a start may take. `proof`: the first output is insisted upon; `total`:
    what the command said about the whole start. Raises UserError."""
    settings = config.load()

    def seconds(name: str, built_in: float) -> float:
        return float(settings.get(f"timeouts.{name}", built_in))

    built_in = Deadlines()
    start = settings.get("timeouts.start")
    return Deadlines(
        monitor=seconds("monitor", built_in.monitor),
        first_output=seconds("first_output", FIRST_OUTPUT_SECONDS) if proof else None,
        lease=seconds("lease", built_in.lease),
        banner=seconds("ssh", built_in.banner),
        login=seconds("login", built_in.login),
        system=seconds("system", built_in.system),
        root=seconds("root", built_in.root),
        total=total if total is not None else start,
    )
