"""`hostos image ls` and `inspect`: what images this host has."""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from typing import Any

import click

from hostos.cli.common import human_size
from hostos.cli.completing import images


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def ls(as_json: bool) -> None:
    """List the images of this host, the latest first; then the indexes (`hostos image index`)."""
    from hostos.image import indexes
    from hostos.image.store import Store, describe

    store = Store()
    images, broken, joined = store.images(), store.broken(), indexes.all_indexes(store)
    if as_json:
        listed = [describe(item) for item in images]
        bad = [{"path": str(item.path), "reason": item.reason} for item in broken]
        several = [indexes.describe(item) for item in joined]
        click.echo(json.dumps({"schema": 1, "images": listed, "indexes": several, "broken": bad}))
        return
    if images or joined:
        rows = [("HASH", "NAME", "ARCH", "SIZE", "PUBLISHED")]
        for item in images:
            when = datetime.datetime.fromtimestamp(item.published).strftime("%Y-%m-%d %H:%M")
            size = human_size(item.manifest.size) + (" (layers missing)" if item.missing else "")
            rows.append((item.hash[:16], item.name, item.manifest.architecture, size, when))
        for each in joined:
            when = datetime.datetime.fromtimestamp(each.published).strftime("%Y-%m-%d %H:%M")
            rows.append((each.hash[:16], each.name, "+".join(sorted(each.index.images)), "index", when))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        for row in rows:
            click.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]))
    elif sys.stderr.isatty():
        click.echo("no images yet: hostos image publish DIR --name NAME", err=True)
    for bad_item in broken:
        click.echo(f"warning: {bad_item.path} is broken: {bad_item.reason}", err=True)


@click.command()
@click.argument("reference", metavar="HASH|NAME", shell_complete=images)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(reference: str, as_json: bool) -> None:
    """Show what an image is made of and how to get it (checks its metadata against its hash)."""
    from hostos.image import indexes, seeding
    from hostos.image.ipfs import recorded
    from hostos.image.store import Store, describe

    store = Store()
    joined = indexes.find(store, reference)
    if joined is not None:
        _inspect_index(store, joined, as_json)
        return
    found = store.get(reference)
    bundle = store.bundle(found.hash)
    cid = recorded(found)
    seed = seeding.status()
    peers = (seed.address,) if seed else ()
    layers: list[dict[str, Any]] = [
        {
            "hash": torrent.info_hash,
            "size": torrent.size,
            "piece_size": torrent.piece_size,
            "file": str(store.layer_path(layer)),
            "present": layer.torrent not in found.missing,
            "magnet": torrent.magnet(peers),
        }
        for torrent, layer in zip(bundle.layers, bundle.manifest.layers, strict=True)
    ]
    if as_json:
        more = {
            "cid": cid,
            "magnet": bundle.torrent.magnet(peers),
            "layers": layers,
            "seed": seed.address if seed else None,
        }
        click.echo(json.dumps({**describe(found), **more}))
        return
    boot = bundle.manifest.boot
    lines = [
        ("image", found.hash),
        ("name", found.name),
        ("architecture", bundle.manifest.architecture),
        ("size", human_size(bundle.manifest.size)),
        ("published", datetime.datetime.fromtimestamp(found.published).isoformat(" ", "seconds")),
        ("command", " ".join(map(repr, boot.command)) or "the image's init"),
        *(("env", f"{key}={value!r}") for key, value in boot.env),
        ("user", boot.user or "root"),
        *([("private", cipher)] if (cipher := bundle.manifest.layers[-1].cipher) else []),
        *([("workdir", boot.workdir)] if boot.workdir else []),
        *([("ports", " ".join(boot.ports))] if boot.ports else []),
        *(("parent" if number == 0 else "", parent) for number, parent in enumerate(bundle.manifest.parents)),
        ("boot trace", _traced(bundle.trace)),
        ("magnet", bundle.torrent.magnet(peers)),
        ("IPFS", cid or "not added: hostos image ipfs"),
        ("seed", seed.address if seed else "not running: hostos seed start"),
    ]
    history = bundle.manifest.history or ("",) * len(layers)
    for number, layer in enumerate(layers):
        lines += [
            (f"layer {number}", layer["hash"]),
            *([("  made by", history[number])] if history[number] else []),
            ("  size", f"{human_size(layer['size'])} in pieces of {layer['piece_size'] >> 10} KiB"),
            ("  file", layer["file"] if layer["present"] else "missing"),
            ("  magnet", layer["magnet"]),
        ]
    for key, value in lines:
        click.echo(f"{key + ':' if key else '':14} {value}")


def _inspect_index(store: Any, found: Any, as_json: bool) -> None:
    from hostos.image import indexes, seeding

    if as_json:
        click.echo(json.dumps(indexes.describe(found)))
        return
    seed = seeding.status()
    lines = [
        ("index", found.hash),
        ("name", found.name),
        ("published", datetime.datetime.fromtimestamp(found.published).isoformat(" ", "seconds")),
        ("magnet", found.index.torrent().magnet((seed.address,) if seed else ())),
    ]
    for architecture, image in sorted(found.index.images.items()):
        there = store.find(image)
        known = f"{there.name}, {human_size(there.manifest.size)}" if there else "not in this store"
        lines.append((architecture, f"{image}  {known}"))
    for key, value in lines:
        click.echo(f"{key + ':':14} {value}")


def _traced(trace: Any) -> str:
    if trace is None:
        return "none"
    commands = [shlex.join(workload.command) or "(init)" for workload in trace.workloads]
    sizes = [human_size(workload.size) for workload in trace.workloads]
    return "; ".join(f"{text[:60]}: {size}" for text, size in zip(commands, sizes, strict=True))


COMMANDS = (ls, inspect)
