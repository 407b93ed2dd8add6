"""The system's ssh and scp, for people: `hostos ssh`, `hostos cp`, `ssh -F .../ssh_config`.

Their configuration stands alone: nothing of the user's own matters beside it. The control key has
no passphrase and no agent is asked, so neither can be in the way.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from hostos.errors import UserError
from hostos.machine.files import write_atomic
from hostos.machine.identity import Identity
from hostos.machine.instance import Instance, machines_dir
from hostos.machine.ssh_words import SshWords
from hostos.paths import private_dir, state_dir


def alias(name: str) -> str:
    """What machine `name` is called in ssh_config and known_hosts."""
    return f"hostos-{name}"


def all_machines_config() -> Path:
    """The ssh_config that includes those of all machines, present and future."""
    return state_dir() / "ssh_config"


def write_ssh_config(instance: Instance, identity: Identity, port: int) -> None:
    """(Re)write the instance's ssh_config; its host is called like the identity's alias."""
    write_atomic(instance.ssh_config, ssh_config(identity, instance.address, port).encode(), 0o644)
    write_all_machines_config()


def write_all_machines_config() -> Path:
    """(Re)write the file that includes all; returns its path. Raises OSError, UserError."""
    path = all_machines_config()
    pattern = str(machines_dir()).replace("\\", "\\\\").replace('"', '\\"') + "/*/ssh_config"
    text = f'# Written by hostos. In ~/.ssh/config, above every Host: Include "{path}"\nInclude "{pattern}"\n'
    if not path.is_file() or path.read_text() != text:
        private_dir(path.parent)
        write_atomic(path, text.encode(), 0o644)
    return path


def ssh_config(identity: Identity, address: str, port: int) -> str:
    """A complete ssh_config(5): nothing of the user's own configuration matters beside it.

    A guest that reboots or is killed closes nothing, and QEMU accepts connections for one that does
    not listen yet: without keep-alives and a time limit a session would wait for ever.
    """
    return f"""\
# Written by hostos at each start. Use: ssh -F THIS_FILE {identity.alias}
Host {identity.alias}
  HostName {address}
  Port {port}
  User root
  IdentityFile {_quote(identity.control.private)}
  IdentitiesOnly yes
  IdentityAgent none
  HostKeyAlias {identity.alias}
  HostKeyAlgorithms ssh-ed25519
  UserKnownHostsFile {_quote(identity.known_hosts)}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  PasswordAuthentication no
  KbdInteractiveAuthentication no
  ConnectTimeout 60
  ServerAliveInterval 10
  ServerAliveCountMax 6
  LogLevel ERROR
"""


def ssh_command(instance: Instance, words: SshWords) -> list[str]:
    """The command line that runs `words.command` in the guest, or a shell if there is none.

    One word is taken as shell text, as ssh does; several arrive as they are. Raises UserError if
    ssh is not installed.
    """
    ssh = shutil.which("ssh")
    if not ssh:
        raise UserError("ssh is not installed", "install the OpenSSH client, or use: hostos run -- command")
    line = [ssh, "-F", str(instance.ssh_config)]
    if words.forwards_agent:
        # The agent is forwarded; IdentitiesOnly still keeps it from being asked for a login.
        line += ["-o", "IdentityAgent=SSH_AUTH_SOCK"]
    line += [*words.options, alias(instance.name)]
    command: Sequence[str] = words.command
    if command:
        line += ["--", command[0] if len(command) == 1 else shlex.join(command)]
    return line


def _quote(path: Path) -> str:
    """`path` as ssh_config takes it: "%" begins a token, "\\" and quotes are escaped."""
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
