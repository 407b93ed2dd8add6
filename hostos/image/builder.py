"""From a recipe to an image in the store: base, steps, each from the cache if nothing of it changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hostos.errors import UserError
from hostos.image import base, build_step, containerfile, oci, recipe_lock, sandbox
from hostos.image import recipe as recipes
from hostos.image.bill import bill_of
from hostos.image.build_step import Place
from hostos.image.buildcache import BuildCache, Made, Packages, key, lent
from hostos.image.child import check_depth, lineage, pack_layer, storing
from hostos.image.entries import Entry
from hostos.image.layers import check_plain, torrents
from hostos.image.layout import read_layout
from hostos.image.pack import architecture_of, kind_of, pack
from hostos.image.publish import default_piece_size
from hostos.image.recipe import Recipe, Step
from hostos.image.recipe_lock import Locked
from hostos.image.recording import Recording, to_trace
from hostos.image.store import Store, StoredImage
from hostos.live.manifest import MAX_HISTORY, BootConfig, Layer, Manifest
from hostos.live.torrents import Torrent, make_layer_torrent
from hostos.steps import Steps

if TYPE_CHECKING:
    from hostos.image.pins import Pins


@dataclass(frozen=True)
class Options:
    """`update`: take what mirrors and names have now; `locked`: fail unless everything is locked;
    `fresh`: use nothing from the cache; `aside`: leave cache and lock file as they are, and keep layers there."""

    update: bool = False
    locked: bool = False
    fresh: bool = False
    aside: Path | None = None


@dataclass(frozen=True)
class Result:
    """`cached`: how many steps came from the cache, of `steps`; `inherited`: layers that are its parent's."""

    image: StoredImage
    steps: int
    cached: int
    inherited: int


def build(
    file: Path, kind: str, steps: Steps, options: Options, store: Store | None = None, *, parents: Store | None = None
) -> Result:
    """Build a recipe, and those it is made from. Raises UserError; then nothing is published.

    `parents`: where images that are no recipes come from, if not from `store`.
    """
    store = store or Store()
    line = recipes.lineage(recipes.load(file, kind))
    result: Result | None = None
    pins: Pins | None = None
    for each in line:
        one = _Build(each, result.image if result else None, store, steps, options, parents or store, pins)
        result, pins = one.run(), one.pins
    assert result is not None
    return result


class _Build:
    def __init__(
        self,
        recipe: Recipe,
        parent: StoredImage | None,
        store: Store,
        steps: Steps,
        options: Options,
        parents: Store,
        pins: Pins | None,
    ) -> None:
        self.snapshots, self.pins = parents, pins
        self.parents = store if parent else parents
        self.recipe, self.store, self.steps, self.options = recipe, store, steps, options
        before = None if options.update else recipe_lock.read(recipe.file).get(recipe.type)
        if before is None and options.locked:
            raise UserError(
                f"{recipe.label} is not locked: {recipe_lock.path_of(recipe.file)} does not have it",
                f"hostos image build {recipe.file}",
            )
        self.before = before
        epoch = before.epoch if before else recipe.source_date_epoch
        if epoch is None:
            epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        self.now = Locked(epoch)
        self.cache = BuildCache(options.aside)
        self.parent = parent or self._stored_parent()
        self.layers: list[tuple[Torrent, Path]] = torrents(self.parents, self.parent) if self.parent else []
        self.made: list[str] = list(self._inherited())
        self.inherited = len(self.layers)
        self.architecture = recipe.architecture or (self.parent.manifest.architecture if self.parent else "")
        self.boot = self.parent.manifest.boot if self.parent else BootConfig()
        self.cached = self.counted = 0

    def _stored_parent(self) -> StoredImage | None:
        if not self.recipe.parent:
            return None
        locked = self.before.parent if self.before and self.before.source == self.recipe.parent else ""
        found = self.parents.find(locked or self.recipe.parent)
        if found is None and locked:
            raise UserError(
                f"{self.recipe.file}: its parent {self.recipe.parent!r} is locked as {locked[:16]}…, which isn't here",
                "get that image; or take what the name means now: --update",
            )
        if found is None:
            where = f"{self.recipe.file}: its parent {self.recipe.parent!r}"
            raise UserError(
                f"{where} is neither a type of this file, a recipe nor an image of this host",
                "hostos image ls shows the images; a recipe is named FILE.toml or FILE.toml#TYPE",
            )
        check_plain(found)
        wanted = self.recipe.architecture
        if wanted and found.manifest.architecture != wanted:
            raise UserError(
                f"{self.recipe.file} is for {wanted}, its parent {found.name} for {found.manifest.architecture}"
            )
        return found

    def _inherited(self) -> tuple[str, ...]:
        if self.parent is None:
            return ()
        return self.parent.manifest.history or ("",) * len(self.parent.manifest.layers)

    def run(self) -> Result:
        recipe = self.recipe
        if recipe.trace:
            self.now.trace = _trace_hash(recipe, self.before)
        with ExitStack() as stack:
            who = sandbox.ids() if _needs_sandbox(recipe) else _NOBODY
            self._pin(who)
            place = Place(self.layers, stack, self.now.epoch, who, self._log(), pins=self.pins)
            for name, value in self.boot.env:
                place.env[name] = value
            if recipe.base:
                self._base(place, stack)
            for step in recipe.steps:
                self._step(step, place)
            if len(self.layers) == self.inherited and not self.layers:
                raise UserError(f"{recipe.file}: the recipe makes no file at all", "add a [[step]]")
            return self._finish(place)

    def _pin(self, who: sandbox.Ids) -> None:
        """Find the snapshots that packages come from: the base's, also for the recipes made from it."""
        if self.recipe.base and self.recipe.base.snapshots:
            from hostos.image.pins import Pins

            locked = self.before.snapshots if self.before else {}
            self.pins = Pins.of(self.recipe.base, locked, self.snapshots, who, self.steps)
        if self.pins:
            self.now.snapshots = self.pins.hashes

    def _log(self) -> Path:
        return self.cache.logs / f"{self.recipe.name.replace('/', '-')}.log"

    # --- base ---------------------------------------------------------------------------------------

    def _base(self, place: Place, stack: ExitStack) -> None:
        found = self.recipe.base
        assert found is not None
        arch = self.recipe.architecture or os.uname().machine
        what = f"base {found.kind} {Path(found.value).name if found.value else ''}".strip()
        if found.kind == "scratch":
            return
        if found.kind in ("oci", "containerfile"):
            source = Path(found.value)
            if found.kind == "containerfile":
                source = containerfile.build(
                    source, self.now.epoch, place.who, place.log, stack, self.steps, fresh=self.options.fresh
                )
            image = oci.read(source, found.tag, stack, self.steps)
            if self.recipe.architecture not in (None, image.architecture):
                where = f"{self.recipe.file} is for {self.recipe.architecture}"
                raise UserError(f"{where}, its base {found.value} for {image.architecture}", "take one that fits")
            for number, (text, entries) in enumerate(image.layers(stack)):
                with self.storing() as temporary:
                    self._add(self._keep(self._packed(entries, temporary / f"{number}", arch)), text or what)
            self.architecture, self.boot = image.architecture, image.boot
            return
        if found.kind in ("directory", "tar"):
            packed = self._local(Path(found.value), what)
            self.architecture = packed.architecture
            self._add(packed, what)
            return
        text = found.text
        locked = self._locked(text)
        parts = {name: str(value) for name, value in vars(found).items() if name != "snapshots"}
        name = key("base", parts, arch, self.now.epoch, *self._pinned())
        made = self._known(name, what, locked)
        if made is None:
            with ExitStack() as inner, self.storing() as temporary:
                tree = base.fetch(found, arch, self.now.epoch, place.who, place.log, inner, self.steps, self.pins)
                build_step.check_lock(tree.packages, locked, f"{self.recipe.file}: {what}")
                made = self.cache.put(name, self._packed(tree.entries, temporary / "base", arch, tree.packages))
        self.now.packages[text] = made.packages
        self.architecture = made.architecture
        self._add(made, what)

    def _local(self, source: Path, what: str) -> Made:
        """A directory or an archive as a layer. A directory is packed each time: what is in it, and whose, would have
        to be read all the same."""
        name = ""
        if kind_of(source) != "directory":
            with source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = key("archive", digest, self.recipe.architecture)
            if (known := self._known(name, what, None, mirrored=False)) is not None:
                return known
        with self.storing() as temporary:
            packed = pack(source, temporary / "base", self.steps, architecture=self.recipe.architecture)
            torrent = make_layer_torrent(packed.path, piece_size=default_piece_size(packed.size))
            made = Made((torrent, packed.path), {}, packed.architecture)
            return self.cache.put(name, made) if name else self._keep(made)

    def _pinned(self) -> list[list[str]]:
        """Snapshots, as a part of a cache key."""
        return [list(self.pins.hashes.values())] if self.pins else []

    def _locked(self, text: str) -> Packages | None:
        """What a base or a step installed last time. Raises UserError if it has to be locked and is not."""
        found = self.before.packages.get(text) if self.before else None
        if found is None and self.options.locked:
            what = f"{self.recipe.file}: {text.strip()}"
            raise UserError(f"{what} is not locked", "build it without --locked first")
        return found

    def _known(self, name: str, what: str, locked: Packages | None, *, mirrored: bool = True) -> Made | None:
        """From the cache, if that may be asked; `mirrored`: what a mirror has may have changed since."""
        self.counted += 1
        made = None if self.options.fresh or (self.options.update and mirrored) else self.cache.get(name)
        if made is None or (locked is not None and made.packages != locked):
            return None
        self.cached += 1
        self.steps.note(f"{what}: from the cache")
        return made

    @contextmanager
    def storing(self) -> Iterator[Path]:
        """A directory of the store to make layers in; a full disk becomes a failure that says so."""
        with storing(self.store, self.recipe.name), self.store.incoming() as temporary:
            yield temporary

    def _packed(self, entries: list[Entry], file: Path, arch: str, packages: Packages | None = None) -> Made:
        machine = architecture_of(entries) or self.architecture or arch
        if self.layers and self.architecture and machine != self.architecture:
            raise UserError(
                f"{self.recipe.file}: a step brought programs for {machine}, the image is {self.architecture}"
            )
        torrent, packed = pack_layer(entries, file, machine, self.steps)
        return Made((torrent, packed.path), packages or {}, machine)

    def _add(self, made: Made, text: str) -> None:
        if made.layer is None or made.layer[0].info_hash in {torrent.info_hash for torrent, _ in self.layers}:
            return
        check_depth(len(self.layers) + 1, self.parent.name if self.parent else self.recipe.name)
        self.layers.append(made.layer)
        self.made.append(text[:MAX_HISTORY])

    def _keep(self, made: Made) -> Made:
        """A layer that no step made, in the cache."""
        assert made.layer is not None
        return self.cache.put(key("layer", made.layer[0].info_hash), made)

    # --- steps --------------------------------------------------------------------------------------

    def _step(self, step: Step, place: Place) -> None:
        if step.kind == "env":
            place.env.update(dict(item.partition("=")[::2] for item in step.value))
            self.boot = replace(self.boot, env=tuple(sorted({**dict(self.boot.env), **place.env}.items())))
            return
        if step.kind == "user":
            place.user = step.value[0]
            self.boot = replace(self.boot, user=place.user)
            return
        if step.kind == "workdir":
            place.workdir = step.value[0]
            self.boot = replace(self.boot, workdir=place.workdir)
            return
        text = str(step)
        title = text.splitlines()[0][:60]
        what = f"{self.recipe.file}:{step.line}: {title}"
        locked = self._locked(text) if step.kind == "packages" else None
        below = [torrent.info_hash for torrent, _ in self.layers]
        settings = [sorted(place.env.items()), place.user, place.workdir, self.now.epoch]
        content = build_step.digest(build_step.copied(self.recipe, step)) if step.kind == "copy" else ""
        pinned = self._pinned() if step.kind == "packages" else []
        name = key(
            step.kind, step.value, step.network, step.to, step.owner, step.mode, below, settings, content, *pinned
        )
        made = self._known(name, what, locked, mirrored=step.kind == "packages")
        if made is None:
            with ExitStack() as inner, self.storing() as temporary, self.steps.step(title) as shown:
                packages: Packages = {}
                if step.kind == "copy":
                    entries = build_step.copy(self.recipe, step, place)
                elif step.kind == "packages":
                    entries, packages = build_step.install(step, place, locked, inner, self.steps, what)
                else:
                    entries = build_step.run(step, place, inner, self.steps, what)
                made = Made(None, packages, self.architecture)
                if entries:
                    made = self._packed(entries, temporary / "step", os.uname().machine, packages)
                made = self.cache.put(name, made)
                shown.detail = f"{len(entries)} entries" if entries else "changed nothing"
        if step.kind == "packages":
            self.now.packages[text] = made.packages
        self.architecture = self.architecture or made.architecture
        self._add(made, text)

    # --- the image ----------------------------------------------------------------------------------

    def _finish(self, place: Place) -> Result:
        recipe = self.recipe
        boot = recipe.boot_config(self.boot)
        manifest = Manifest(
            recipe.name,
            self.architecture or os.uname().machine,
            tuple(Layer(torrent.info_hash, torrent.size, torrent.name) for torrent, _ in self.layers),
            boot,
            parents=lineage(self.parent),
            history=tuple(self.made),
        )
        with self.storing() as temporary:
            archives = {name: package for found in self.now.packages.values() for name, package in found.items()}
            bill = bill_of(place.tree(), manifest, archives)
            lenders = [
                (torrent, path if path.is_relative_to(self.store.root) else lent(path, temporary, number))
                for number, (torrent, path) in enumerate(self.layers)
            ]
            image = self.store.add(manifest, lenders, self._trace(manifest), bill)
        self.now.parent, self.now.source = (self.parent.hash, recipe.parent) if self.parent else ("", "")
        self.now.image = image
        if self.options.aside is None:
            # Read again: a parent of the same file was written meanwhile.
            recipe_lock.write(recipe.file, {**recipe_lock.read(recipe.file), recipe.type: self.now})
        return Result(self.store.get(image), self.counted, self.cached, self.inherited)

    def _trace(self, manifest: Manifest) -> bytes | None:
        if self.recipe.trace and len(self.layers) > self.inherited:
            recording = Recording.read(self.recipe.trace)
            return to_trace(recording, read_layout(self.layers[-1][1]), [layer.size for layer in manifest.layers])
        inherited = self.parent.directory / "trace.json" if self.parent else None
        return inherited.read_bytes() if inherited and inherited.exists() else None


_NOBODY = sandbox.Ids(((0, 0, 0),), ((0, 0, 0),))


def _needs_sandbox(recipe: Recipe) -> bool:
    fetched = recipe.base is not None and recipe.base.kind in ("debian", "ubuntu", "arch", "containerfile")
    return fetched or any(step.kind in ("run", "packages") for step in recipe.steps)


def _plain(packages: Packages | None) -> dict[str, list[str]] | None:
    return {name: [p.version, p.sha256] for name, p in sorted(packages.items())} if packages is not None else None


def _trace_hash(recipe: Recipe, before: Locked | None) -> str:
    assert recipe.trace is not None
    try:
        digest = hashlib.sha256(recipe.trace.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{recipe.file}: its trace {recipe.trace}: {error.strerror}", "hostos image trace --save"
        ) from None
    if before and before.trace and before.trace != digest:
        raise UserError(f"{recipe.trace} is not the recording that is locked", "take it: hostos image build --update")
    return digest
