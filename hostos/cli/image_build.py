"""`hostos image build|verify|import|sbom`: images from recipes and from other builders' images."""

from __future__ import annotations

from pathlib import Path

import click

from hostos.cli.common import steps, talk_options
from hostos.cli.completing import images
from hostos.cli.image_layers import announce

type_option = click.option("--type", "kind", default="", metavar="NAME", help="Which [type.NAME] of the file.")
recipe_argument = click.argument("recipe", metavar="FILE.toml", type=click.Path(path_type=Path))


@click.command()
@recipe_argument
@type_option
@click.option("--update", is_flag=True, help="Take what mirrors and parents have now, and lock that.")
@click.option("--locked", is_flag=True, help="Fail rather than build something that is not locked.")
@click.option("--no-cache", "fresh", is_flag=True, help="Run every step, whatever the cache has.")
@talk_options
def build(recipe: Path, kind: str, update: bool, locked: bool, fresh: bool) -> None:
    """Build the image a recipe describes, and print its hash.

    Steps run in a user namespace: as root of nothing on this host. Each becomes a layer and is kept, so
    that only what changed is built again. FILE.toml.lock records what was used (package versions and
    hashes, parents, the boot trace): with it, the same recipe gives the same hash on any machine.

    \b
      hostos image build gaming.toml
      hostos image build family.toml --type Gaming      one of several in a file
    """
    from hostos.image import builder

    made = builder.build(recipe, kind, steps(), builder.Options(update, locked, fresh))
    announce(made.image, sum(layer.size for layer in made.image.manifest.layers[made.inherited :]))
    click.echo(f"{made.cached} of {made.steps} steps from the cache", err=True)


@click.command()
@recipe_argument
@type_option
@talk_options
def verify(recipe: Path, kind: str) -> None:
    """Build a locked recipe again, with nothing from the cache, and compare the hashes.

    Exit code 1 if they differ; then it says in which layer, and what in it.
    """
    from hostos.image import verifying

    made = verifying.verify(recipe, kind, steps())
    click.echo(made)
    click.echo("reproduced: the same hash", err=True)


@click.command(name="import")
@click.argument("source", metavar="LAYOUT|ARCHIVE", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="What to call it, e.g. web/nginx.")
@click.option("--tag", default="", help="Which image, if it holds several.")
@click.option("--level", type=click.IntRange(1, 22), default=3, show_default=True,
              help="zstd's; `publish` takes 15, which is much slower and a fifth smaller.")  # fmt: skip
@talk_options
def import_(source: Path, name: str, tag: str, level: int) -> None:
    """Take an OCI image (a layout or an archive, also of docker save), and print its hash.

    Each of its layers becomes a layer, with whiteouts and all; command, environment, user, directory and
    ports are kept. Every blob is checked against its digest; nothing is extracted on this host.

    \b
      skopeo copy docker-daemon:nginx:latest oci-archive:nginx.tar && hostos image import nginx.tar --name web/nginx
      podman save --format oci-archive nginx -o nginx.tar
    """
    from hostos.image import importing

    image, new = importing.import_oci(source, name, tag, steps(), level=level)
    announce(image, new)


@click.command()
@click.argument("reference", metavar="IMAGE", shell_complete=images)
def sbom(reference: str) -> None:
    """Print what packages an image holds, as CycloneDX JSON: as it was recorded, or else as its tree says now."""
    from hostos.image import importing

    click.echo(importing.bill(reference, steps()).decode(), nl=False)


COMMANDS = (build, verify, import_, sbom)
