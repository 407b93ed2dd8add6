"""Adds images to an IPFS node: a UnixFS directory with everything an image consists of, so that one CID
names all of it.

    manifest.json  layers/0.torrent …  trace.json     as in the image's torrent
    layers/0.squashfs …                                the layers themselves

Layers are cut into chunks of 64 KiB in raw leaves, for those who read a little here and there. The node is
asked through Kubo's RPC API (https://docs.ipfs.tech/reference/kubo/rpc/), which is for its owner alone:
nobody else is told anything by hostos; whether the node tells others is its own configuration.
"""

from __future__ import annotations

import http.client
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hostos.errors import UserError, failure
from hostos.image.store import Store, StoredImage
from hostos.live import cid
from hostos.live.url import Url, parse_url
from hostos.steps import Steps

DEFAULT_API = "http://127.0.0.1:5001"
CHUNK = 64 * 1024
RECORD = "ipfs.json"
"""Beside the image in the store: the CID it was given."""
PATIENCE = 60.0
"""Seconds the node may take between two signs of life."""
MAX_ANSWER = 16 * 1024 * 1024
_READ = 1024 * 1024


@dataclass(frozen=True)
class Part:
    """A file of the directory. `content`: bytes, or where they are."""

    path: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def parts(store: Store, image: StoredImage) -> list[Part]:
    """What is added for an image. Raises UserError if layers are missing or the image is damaged."""
    if image.missing:
        raise UserError(
            f"layers of image {image.name} are missing in the store: it cannot be added to IPFS", "publish it again"
        )
    bundle = store.bundle(image.hash)
    found = [Part(path, data) for path, data in sorted(bundle.files.items())]
    for number, layer in enumerate(bundle.manifest.layers):
        found.append(Part(f"layers/{number}.squashfs", store.layer_path(layer)))
    return found


def add(store: Store, image: StoredImage, api: str, steps: Steps) -> str:
    """Add an image to the node at `api` and pin it there; its CID. Raises UserError."""
    url = parse_api(api)
    everything = parts(store, image)
    total = sum(part.size for part in everything)
    with steps.step("add to IPFS") as step:
        found = _add(url, everything, lambda done: step.progress(f"{done >> 20} of {total >> 20} MiB"))
        step.detail = f"{total >> 20} MiB -> {url}"
    record = {"schema": 1, "cid": found, "chunk": CHUNK}
    (image.directory / RECORD).write_text(json.dumps(record) + "\n")
    return found


def recorded(image: StoredImage) -> str | None:
    """The CID an image was given when it was last added to a node; None if it never was."""
    try:
        record = json.loads((image.directory / RECORD).read_text())
        return str(cid.parse(record["cid"]))
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def parse_api(text: str) -> Url:
    """The address of a node's RPC API. Raises UserError."""
    try:
        return parse_url(text, DEFAULT_API)
    except UserError as error:
        raise UserError(f"--ipfs-api: {error.message}", error.hint) from None


def check(api: str) -> str:
    """The node's version, so that what is wrong is found before much is done. Raises UserError."""
    url = parse_api(api)
    answer = _ask(url, "/api/v0/version", None, {})
    try:
        return str(json.loads(answer)["Version"])
    except (ValueError, KeyError, TypeError):
        raise _not_kubo(url) from None


def _add(url: Url, everything: list[Part], progress: Callable[[int], None]) -> str:
    query = "pin=true&wrap-with-directory=true&cid-version=1&raw-leaves=true&quieter=false&progress=false"
    boundary = secrets.token_hex(16)
    answer = _ask(
        url,
        f"/api/v0/add?{query}&hash=sha2-256&chunker=size-{CHUNK}",
        _multipart(everything, boundary, progress),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    names: dict[str, str] = {}
    try:
        for line in answer.splitlines():
            event = json.loads(line)
            if "Message" in event:
                raise failure(f"the IPFS node at {url} could not add the image: {str(event['Message'])[:300]}")
            names[event.get("Name", "")] = event["Hash"]
        found = cid.parse(names[""])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _not_kubo(url) from None
    if found.codec != cid.DAG_PB or not {part.path for part in everything} <= names.keys():
        raise failure(f"the IPFS node at {url} did not add all of the image", "see its log")
    return str(found)


def _multipart(everything: list[Part], boundary: str, progress: Callable[[int], None]) -> Iterator[bytes]:
    """RFC 7578, with paths for names, which is how Kubo learns of directories."""
    done = 0
    for part in everything:
        name = quote(part.path, safe="")
        yield (
            f"--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()  # fmt: skip
        if isinstance(part.content, bytes):
            yield part.content
        else:
            with part.content.open("rb") as file:
                while data := file.read(_READ):
                    yield data
                    done += len(data)
                    progress(done)
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def _ask(url: Url, path: str, body: Iterator[bytes] | None, headers: dict[str, str]) -> bytes:
    kind = http.client.HTTPSConnection if url.secure else http.client.HTTPConnection
    with closing(kind(url.host, url.port, timeout=PATIENCE)) as connection:
        try:
            connection.request("POST", url.path + path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER)
        except ConnectionRefusedError:
            raise failure(
                f"no IPFS node answers at {url}", "start one (ipfs daemon), or say where it is: --ipfs-api URL"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise failure(f"the IPFS node at {url}: {error or type(error).__name__}", "see its log") from None
    if answer.status != 200:
        raise _refused(url, answer.status, content)
    return content


def _refused(url: Url, status: int, content: bytes) -> UserError:
    try:
        message: Any = json.loads(content)["Message"]
    except (ValueError, KeyError, TypeError):
        return _not_kubo(url, f" (status {status})")
    return failure(f"the IPFS node at {url} refuses: {str(message)[:300]}")


def _not_kubo(url: Url, more: str = "") -> UserError:
    return failure(
        f"what answers at {url} is not the RPC API of an IPFS node{more}",
        "the API is not the gateway: ipfs config Addresses.API",
    )
