"""Defaults of one's own: `config.toml` in the configuration directory (docs/config.md).

What is typed wins over what a machine remembers of its last start, that over this file, and this
over what is built in. The file is read when a command needs one of its keys, never before.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hostos.errors import UserError
from hostos.paths import config_dir

Kind = Literal["integer", "number", "text", "list"]


@dataclass(frozen=True)
class Key:
    """One setting. `default` None: decided elsewhere, as `help` says. Numbers have bounds, texts may
    have `choices`."""

    name: str
    kind: Kind
    default: Any
    help: str
    least: float = 0
    most: float = float("inf")
    choices: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> Any:
        """`value` if it can be meant, else UserError; `where` is named in the message."""
        if self.kind == "list":
            good = isinstance(value, list) and all(isinstance(each, str) and each for each in value)
        elif self.kind == "text":
            good = isinstance(value, str) and bool(value) and (not self.choices or value in self.choices)
        else:
            # bool is an int to Python.
            types = (int,) if self.kind == "integer" else (int, float)
            good = type(value) in types and self.least <= value <= self.most
        if not good:
            raise UserError(f"{where}: {value!r} is no value of {self.name}", self.expects())
        return value

    def expects(self) -> str:
        """What a value looks like, for people."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind == "list":
            return "a list of texts"
        if self.kind == "text":
            return "a text"
        article = "an integer" if self.kind == "integer" else "a number"
        if self.most == float("inf"):
            return f"{article} from {self.least:g}"
        return f"{article} from {self.least:g} to {self.most:g}"

    def parse(self, words: tuple[str, ...]) -> Any:
        """What was typed, as a value. Raises UserError."""
        if self.kind == "list":
            return self.check(list(words), "config")
        if len(words) != 1:
            raise UserError(f"{self.name} takes one value", self.expects())
        if self.kind == "text":
            return self.check(words[0], "config")
        try:
            value = int(words[0]) if self.kind == "integer" else float(words[0])
        except ValueError:
            raise UserError(f"config: {words[0]!r} is no value of {self.name}", self.expects()) from None
        return self.check(value, "config")


KEYS = {
    key.name: key
    for key in (
        Key("machine.memory", "integer", 1024, "memory of a guest, MiB", 1, 1 << 24),
        Key("machine.cpus", "integer", 2, "CPUs of a guest", 1, 64),
        Key("machine.accel", "text", "auto", "accelerator", choices=("auto", "kvm", "hvf", "tcg")),
        Key(
            "machine.start",
            "text",
            "auto",
            "from a template where that works, or always booted",
            choices=("auto", "cold"),
        ),
        Key("machine.keys", "list", None, "SSH public key files to let in; else a pair of hostos's own"),
        Key(
            "machine.arch",
            "text",
            None,
            "architecture of guests without machine.os; else this host's",
            choices=("x86_64", "aarch64"),
        ),
        Key("machine.os", "text", None, "directory of the OS build; else ./dist, then the data directory"),
        Key("timeouts.scale", "number", 1.0, "stretches all timeouts but timeouts.start", 0.01, 1000),
        Key("timeouts.start", "number", None, "for a whole start, seconds; else only each stage has one", 0.1, 86400),
        Key("timeouts.monitor", "number", 20.0, "until QEMU's monitor answers, seconds", 0.1, 86400),
        Key("timeouts.first_output", "number", 8.0, "until a guest under KVM or HVF prints, seconds", 0.1, 86400),
        Key("timeouts.lease", "number", 30.0, "until a guest on a bridge has its address, seconds", 0.1, 86400),
        Key("timeouts.ssh", "number", 60.0, "until the guest's sshd greets, seconds", 0.1, 86400),
        Key("timeouts.login", "number", 30.0, "until it has taken the key, seconds", 0.1, 86400),
        Key("timeouts.system", "number", 60.0, "until systemd says that all is up, seconds", 0.1, 86400),
        Key("timeouts.root", "number", 150.0, "until an image is mounted as the root, seconds", 0.1, 86400),
        Key("timeouts.down", "number", 30.0, "for a guest to power itself off, seconds", 0.1, 86400),
        Key("talk.level", "text", "normal", "how much is said", choices=("quiet", "normal", "verbose")),
        Key("console.detach_key", "text", "ctrl-]", "leaves hostos console"),
        Key("container.peers", "list", None, "peers to ask for images, ADDR:PORT"),
        Key("container.web_seeds", "list", None, "web servers to ask for images, http://HOST[:PORT][/PATH]"),
        Key("container.gateways", "list", None, "IPFS gateways to ask for CIDs, http://HOST:PORT"),
        Key(
            "swarm.encryption",
            "text",
            "required",
            "of connections between peers",
            choices=("required", "preferred", "off"),
        ),
        Key(
            "swarm.discovery",
            "text",
            "off",
            "how peers are found that nobody named: on the local network, or there and through the DHT",
            choices=("off", "lan", "public"),
        ),
        Key("swarm.dht_nodes", "list", None, "HOST:PORT, where the DHT is entered; else nodes of the public one"),
        Key("swarm.download_limit", "text", None, "what a machine's client may receive, bytes a second; else all"),
        Key("swarm.upload_limit", "text", None, "what a machine's client may send, bytes a second; else all"),
        Key("seed.listen", "text", None, "where the seed listens, ADDRESS[:PORT]; else 127.0.0.1"),
        Key("seed.upload_limit", "text", None, "what the seed may send, e.g. 2M bytes a second; else all it can"),
        Key("mirror.listen", "list", None, "where the package cache listens, ADDRESS:PORT; else loopback, 3143"),
        Key("mirror.share", "text", None, "where it serves peers, ADDRESS[:PORT]; else nowhere"),
        Key("mirror.peers", "list", None, "peers to ask for packages, HOST[:PORT]"),
        Key("mirror.lan", "text", "no", "find peers on the local network", choices=("yes", "no")),
        Key("mirror.dht", "list", None, "nodes of a DHT to find peers in, HOST:PORT"),
        Key("mirror.cluster_key", "text", None, "file with the key that members of a private cluster share"),
        Key("mirror.size", "text", "20G", "what the package cache may hold"),
        Key("mirror.keep_days", "integer", 90, "after so many days unused, a package is removed; 0: never", 0, 36500),
        Key("mirror.upload_limit", "text", None, "what peers may get, e.g. 2M bytes a second; else all there is"),
        Key("mirror.download_limit", "text", None, "what mirrors and peers may send, bytes a second; else all"),
        Key("mirror.contribute", "integer", 0, "packages a day to fetch and offer that nobody here uses", 0, 1000),
        Key("mirror.prefetch", "text", "no", "fetch new versions of what is used", choices=("yes", "no")),
    )
}


def path() -> Path:
    return config_dir() / "config.toml"


def key(name: str) -> Key:
    """The key called `name`; raises UserError naming the nearest one."""
    if name in KEYS:
        return KEYS[name]
    near = difflib.get_close_matches(name, KEYS, 1) or [each for each in KEYS if each.endswith(f".{name}")]
    hint = f"did you mean {near[0]}?" if near else "hostos config list shows them all"
    raise UserError(f"there is no setting {name!r}", hint)


def load() -> dict[str, Any]:
    """What the file says, checked: full key -> value. Raises UserError naming file and key."""
    import tomllib

    try:
        text = path().read_bytes().decode()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path()} cannot be read: {error}", "mend it: hostos config edit") from None
    try:
        return check(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path()} is not TOML: {error}", "mend it: hostos config edit") from None


def check(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a parsed file; raises UserError for one that is unknown or cannot be meant."""
    found = {}
    for table, values in content.items():
        if not isinstance(values, Mapping):
            raise UserError(
                f"{path()}: {table!r} stands outside of a table", "e.g. [machine] and below it memory = 512"
            )
        for name, value in values.items():
            try:
                wanted = key(f"{table}.{name}")
            except UserError as error:
                raise UserError(f"{path()}: {error.message}", error.hint) from None
            plain = list(value) if isinstance(value, list) else value
            found[wanted.name] = wanted.check(plain, str(path()))
    return found


def get(name: str) -> Any:
    """The value of `name`: the file's, else the built-in default. Raises UserError."""
    wanted = key(name)
    return load().get(name, wanted.default)


def expand(text: str) -> Path:
    """A path in the file: `~` is the home directory, a relative one starts there, too."""
    return Path.home() / Path(text).expanduser()
