"""`hostos image capture`: what a running container has changed, as a child of its image."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from hostos.cli.common import json_option, machine_option, print_json, steps, talk_options
from hostos.cli.image_layers import announce
from hostos.errors import UserError, failure

END_SECONDS = 60.0


@click.command()
@click.argument("container")
@machine_option
@click.option("--name", help="What to call the new image.  [default: as the container's, with -captured]")
@click.option(
    "--list", "only_list", is_flag=True, help="Make nothing: list what was added (A), changed (C), deleted (D)."
)
@json_option
@talk_options
def capture(container: str, machine: str, name: str | None, only_list: bool, as_json: bool) -> None:
    """Make what CONTAINER has changed since it was booted a new layer on its image, and print the hash.

    The container stands still meanwhile and then goes on. What it wrote to /tmp and /run is not in it.
    CONTAINER `root` is the machine's own system, if that is an image (hostos up --root); its host name, host keys and
    authorized keys are not in it.

    \b
      hostos image capture web --name web/patched
      hostos image capture web --list             # to put into a recipe, so that it can be made again
    """
    from hostos.cli import live
    from hostos.image import child, overlay
    from hostos.image.entries import arrange, printable
    from hostos.image.layers import read_image
    from hostos.image.sources import read_plain_tar
    from hostos.image.store import Store
    from hostos.live.manifest import check_name
    from hostos.live.root_files import is_given

    if name:
        check_name(name)
    told, store = steps(), Store()
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile())
        with live.guest(machine, told, start=False) as guest:
            answer = guest.ask("capture", name=container)
            parent = store.find(str(answer["image"]))
            if parent is None or parent.missing:
                raise UserError(
                    f"the image of {container}, {answer['image'][:16]}…, is not in this host's store",
                    "capture it where it was published",
                )
            is_system = bool(answer["system"])
            # Below a root that is an image, our own system is still there.
            argv = [*(["chroot", live.SYSTEM] if is_system else []), *answer["argv"]]
            with told.step(f"read what {container} changed") as step, guest.connection.open(argv) as stream:
                stream.settimeout(END_SECONDS)
                shutil.copyfileobj(stream, spool, 1 << 16)
                status = stream.status(END_SECONDS)
                if status:
                    said = stream.stderr().decode(errors="replace").strip().splitlines()
                    raise failure(f"reading the changes failed: {said[-1] if said else status}", "hostos container ls")
                step.detail = f"{spool.tell() >> 10} KiB"
        spool.seek(0)
        found, _ = read_plain_tar(spool, Path(container), stack)
        changed = overlay.from_upper(found)
        if is_system:
            changed = [entry for entry in changed if not is_given(entry.path)]
        entries = arrange(changed, f"what {container} changed")
        if only_list:
            below = read_image(store, parent, stack, told)
            listed = [(kind, printable(path)) for kind, path in overlay.changes(below, entries)]
            if as_json:
                print_json({"schema": 1, "image": parent.hash, "changes": [list(row) for row in listed]})
            for kind, path in listed if not as_json else ():
                click.echo(f"{kind} {path}")
            return
        if len(entries) == 1:
            raise UserError(f"{container} has changed nothing", "hostos image capture CONTAINER --list")
        made = child.add_layer(
            store,
            parent,
            entries,
            name or f"{parent.name}-captured",
            told,
            boot=parent.manifest.boot,
            made_by=f"capture of container {container}",
        )
    image = store.get(made.hash)
    if as_json:
        print_json(
            {"schema": 1, "image": image.hash, "name": image.name, "layer": made.layer, "size": made.packed.size}
        )
    else:
        announce(image, made.packed.size)


COMMANDS = (capture,)
