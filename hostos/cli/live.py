"""What `hostos container` does, joining machine, image store, seed and the guest's live-boot daemon."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hostos.errors import FAILED, UserError
from hostos.image import indexes
from hostos.image.store import Store
from hostos.live import cid
from hostos.live.client import Client
from hostos.live.index import Index
from hostos.live.swarm_settings import SwarmSettings
from hostos.live.torrents import ImageBundle, parse_image_reference, parse_peer, parse_web_seed
from hostos.live.url import parse_gateway, parse_url
from hostos.machine.connection import Connection, ConnectionLost, connect
from hostos.machine.instance import Instance
from hostos.names import resolve as names
from hostos.steps import Steps

SOCKET = "/run/hostos/live.sock"
SYSTEM = "/run/hostos/system"
"""Where our own system is found in a root that is an image."""
CONNECT_SECONDS = 60.0
ANSWER_SECONDS = 60.0
"""What an answer may take beyond the time the request itself allows."""

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Wanted:
    """An image to boot: its hash, who may have it, and its metadata if this host's store has it.

    `gateways`: addresses of those who may have it if `image` is a CID; `web_seeds`: of servers that do.
    `index`: the hash is of an index of this store, and which of its images is wanted depends on the machine
    (`for_machine`)."""

    image: str
    peers: tuple[str, ...]
    bundle: ImageBundle | None = None
    gateways: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    index: Index | None = None

    def for_machine(self, architecture: str) -> Wanted:
        """What is meant in a machine of `architecture`. Raises UserError: there is none for it, or it is
        not for it. What is not known here is decided in the machine."""
        if self.index is not None:
            chosen = resolve(self.index.choose(architecture), self.peers)
            return replace(chosen, index=self.index)
        if self.bundle is not None and architecture:
            check_architecture(self.bundle.manifest.name, self.bundle.manifest.architecture, architecture)
        return self


def check_architecture(image: str, architecture: str, machine: str) -> None:
    """Raises UserError if an image for `architecture` does not run in a `machine`."""
    if architecture not in (machine, "any"):
        raise UserError(
            f"image {image} is for {architecture}, this machine is {machine}",
            f"boot it in a machine of its architecture: hostos up -m {architecture.replace('_', '-')} "
            f"--arch {architecture}; then: hostos container boot -m {architecture.replace('_', '-')} {image}",
        )


DEFAULT_GATEWAY = "http://127.0.0.1:8080"
"""Where a local node listens; no other is ever asked by itself."""


def resolve(
    text: str,
    peers: tuple[str, ...],
    gateways: tuple[str, ...] = (),
    web_seeds: tuple[str, ...] = (),
    *,
    discovers: bool = False,
) -> Wanted:
    """Find out what `text` (a hash, a magnet link, a CID, a name or the beginning of a hash) stands for.

    `peers`: `HOST:PORT` to ask; `gateways`: addresses, for CIDs; `web_seeds`: addresses, for hashes;
    `discovers`: peers may be found that nobody named. Nothing is contacted. Raises UserError: malformed,
    unknown, or not in the store and nobody to ask.
    """
    named = [parse_peer(peer) for peer in peers]
    servers = tuple(str(parse_web_seed(url)) for url in web_seeds)
    asked_for = tuple(str(parse_gateway(gateway)) for gateway in gateways)
    if cid.looks_like_cid(text):
        if named or servers:
            raise UserError("a CID is fetched from gateways, not from peers or web seeds", "name one: --gateway URL")
        return Wanted(str(cid.parse(text)), (), gateways=asked_for or (DEFAULT_GATEWAY,))
    if asked_for:
        raise UserError("--gateway is for CIDs", "for a hash, say who has it: --peer HOST:PORT")
    store = Store()
    listed = indexes.find(store, text)
    if listed is not None:
        return Wanted(listed.hash, tuple(named), index=listed.index)
    if "/" in text and (found := names.resolve(text)) is not None:
        # Somebody's name: from here on it is its hash that counts.
        say(f"hostos: {found}")
        for warning in found.warnings:
            say(f"warning: {warning}")
        text = found.record.image
        if (stored := store.find(text)) is None or stored.missing:
            named = [*named, *found.record.peers]
    stored = store.find(text)
    if stored is None:
        # Not ours: then only a full hash will do, and whoever has it must be known.
        try:
            reference = parse_image_reference(text)
        except UserError as error:
            if "/" in text or not text[:1].isalnum() or ":" in text or len(text) >= 40:
                raise
            raise UserError(f"there is no image {text[:80]!r} here", "hostos image ls") from error
        asked = tuple(dict.fromkeys((*named, *reference.peers)))
        servers = tuple(dict.fromkeys((*servers, *reference.web_seeds)))
        if not asked and not servers and not discovers:
            raise UserError(
                f"image {reference.info_hash[:16]}… is not in this host's store, and no peer was named",
                "say who has it: --peer HOST:PORT or --web-seed URL; or look for it: --lan, --public",
            )
        return Wanted(reference.info_hash, asked, web_seeds=servers)
    if stored.missing:
        if not named and not servers:
            raise UserError(
                f"layers of image {stored.name} are missing in the store, and no peer was named",
                "publish it again, or say who has it: --peer HOST:PORT",
            )
        return Wanted(stored.hash, tuple(named), web_seeds=servers)
    return Wanted(stored.hash, tuple(named), store.bundle(stored.hash), web_seeds=servers)


def own_key(wanted: Wanted) -> bytes | None:
    """The key of a private image that this host has."""
    from hostos.image import privacy

    return privacy.key_of(wanted.image)


def seen_from_guest(peers: tuple[str, ...], instance: Instance) -> tuple[str, ...]:
    """`peers` as the guest has to call them: this host's loopback has another address in there.

    Raises UserError if it has none, because the guest has an address of its own.
    """
    result = []
    for peer in peers:
        host, _, port = peer.rpartition(":")
        if host in _LOOPBACK and instance.own_address:
            raise UserError(
                f"peer {peer} is on this host's loopback, which machine {instance.name!r} can't reach (--net)",
                f"have it listen on {instance.host_address_from_guest} and name that",
            )
        result.append(f"{instance.host_address_from_guest}:{port}" if host in _LOOPBACK else peer)
    return tuple(dict.fromkeys(result))


def urls_from_guest(urls: tuple[str, ...], instance: Instance) -> list[str]:
    """Addresses of gateways or web seeds as the guest has to call them."""
    parsed = [parse_url(url) for url in urls]
    here = str(instance.host_address_from_guest)
    # A certificate is for a name: such a server can only be asked under that name.
    return [str(replace(url, host=here) if url.loopback and not url.secure else url) for url in parsed]


def architecture(machine: str) -> str:
    """Of a machine that runs, or of the one that `hostos up` would start. Raises UserError."""
    from hostos.machine import launcher

    return launcher.architecture(machine)


@dataclass
class Guest:
    """A connected guest. `started`: seconds it took to start the machine, if it was not running."""

    instance: Instance
    connection: Connection
    client: Client
    started: float = 0.0

    def ask(self, op: str, /, *, within: float = 0.0, **fields: Any) -> dict[str, Any]:
        """`Client.ask` with a time limit: `within` seconds for the request itself, and some."""
        self.client.settimeout(within + ANSWER_SECONDS)
        return self.client.ask(op, None, **fields)

    def interact(self, argv: list[str], *, tty: bool, first_output: Any = None) -> int:
        try:
            return self.connection.interact(argv, tty=tty, first_output=first_output)
        except ConnectionLost as error:
            raise UserError(str(error), f"hostos status -m {self.instance.name}", status=FAILED) from error


@contextlib.contextmanager
def guest(machine: str, steps: Steps, *, start: bool) -> Iterator[Guest]:
    """The machine's live-boot daemon; `start`: bring the machine up if it is not running.

    Raises UserError.
    """
    began = time.monotonic()
    before = Instance.named(machine)
    running = before.exists() and before.state()[0] == "running"
    if start and not running:
        from hostos.machine import launcher

        instance = launcher.ensure_up(machine, steps)
    else:
        instance = Instance.load(machine)
    seconds = 0.0 if running else time.monotonic() - began
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connect(instance, deadline=CONNECT_SECONDS))
        try:
            # Below a root that is an image, our own system is still there.
            stream = connection.unix_socket(SOCKET, root=SYSTEM if instance.require_run().root else "")
        except ConnectionLost as error:
            raise UserError(str(error), f"hostos status -m {machine}", status=FAILED) from error
        client = Client(stream)
        stack.callback(client.close)
        yield Guest(instance, connection, client, seconds)


def peers_and_bundle(
    wanted: Wanted, instance: Instance, *, bare: bool, swarm: SwarmSettings | None = None
) -> dict[str, Any]:
    """The fields of a request that say where the image comes from; starts the seed if it is ours.

    `swarm`: how the guest is to deal with strangers (None: as it does); `bare`: hand over nothing but the hash, as
    if this host did not know the image.
    """
    peers = seen_from_guest(wanted.peers, instance)
    fields: dict[str, Any] = {"image": wanted.index.torrent().info_hash if wanted.index and bare else wanted.image}
    if swarm is not None:
        fields["swarm"] = swarm.to_dict()
    if wanted.gateways:
        return {**fields, "gateways": urls_from_guest(wanted.gateways, instance)}
    if wanted.bundle is not None:
        from hostos.image import seeding

        seed = seeding.ensure_started(SwarmSettings(encryption=swarm.encryption) if swarm else None)
        seeding.reload()
        if seed.details.get("only") and wanted.image not in seed.details["only"]:
            raise UserError(
                f"the seed offers only {len(seed.details['only'])} images, and this is none of them",
                "hostos seed stop, then start it without --only, or with this image, too",
            )
        if instance.own_address:
            seeding.admit(instance.host_address_from_guest, instance.guest_address)
        # Everything the seed listens on includes the loopback, which is what another guest reaches.
        peers = (f"{instance.host_address_from_guest}:{seed.port}", *peers)
        if not bare:
            fields["bundle"] = json.loads(wanted.bundle.to_json())
    fields["peers"] = list(dict.fromkeys(peers))
    if wanted.web_seeds:
        fields["web_seeds"] = urls_from_guest(wanted.web_seeds, instance)
    return fields


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def fetched(figures: dict[str, Any]) -> str:
    """`fetched 4.9 MB of 116.5 MB (4.2 %)`."""
    size = int(figures["size"])
    share = 100 * figures["fetched"] / size if size else 0.0
    return f"fetched {megabytes(figures['fetched'])} of {megabytes(size)} ({share:.1f} %)"


def say(text: str) -> None:
    """Talk goes to stderr; stdout belongs to the container."""
    print(text, file=sys.stderr, flush=True)
