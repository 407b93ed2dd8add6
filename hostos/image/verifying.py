"""Builds a locked recipe again from nothing and says whether, and where, the result differs."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.image import builder, overlay, recipe_lock
from hostos.image import recipe as recipes
from hostos.image.entries import printable
from hostos.image.layers import read_layer, torrents
from hostos.image.store import Store, StoredImage
from hostos.steps import Steps

SHOWN = 10
"""Differences that are listed."""


def verify(file: Path, kind: str, steps: Steps, store: Store | None = None) -> str:
    """The image's hash, if building gives it again. Raises UserError if nothing is locked, a failure if it differs."""
    store = store or Store()
    recipe = recipes.load(file, kind)
    locked = recipe_lock.read(recipe.file).get(recipe.type)
    if locked is None or not locked.image:
        raise UserError(
            f"{recipe.label} was never built here: {recipe_lock.path_of(file)} does not have it",
            f"hostos image build {file}",
        )
    with tempfile.TemporaryDirectory(prefix="hostos-verify-", dir=store.root if store.root.exists() else None) as place:
        again = Store(Path(place) / "store")
        made = builder.build(
            file,
            kind,
            steps,
            builder.Options(locked=True, fresh=True, aside=Path(place) / "build"),
            again,
            parents=store,
        )
        if made.image.hash == locked.image:
            return locked.image
        before = store.find(locked.image)
        if before is None:
            raise failure(
                f"{recipe.label} gave {made.image.hash}, not {locked.image}, which isn't here to compare with"
            )
        shown = "\n".join(f"  {line}" for line in differences(store, before, again, made.image))
        raise failure(
            f"{recipe.label} gave {made.image.hash}, not {locked.image}:\n{shown}",
            "a step may depend on its input only: on no clock, chance, or what a server has today",
        )


def differences(store: Store, one: StoredImage, other_store: Store, other: StoredImage) -> list[str]:
    """Where two images differ, in words: their manifests, their layers, entries of the first layer that does."""
    if one.manifest.layers == other.manifest.layers:
        return ["its layers are the same; its manifest, trace or bill of materials is not"]
    for number, (left, right) in enumerate(zip(torrents(store, one), torrents(other_store, other), strict=False)):
        if left[0].info_hash == right[0].info_hash:
            continue
        text = (one.manifest.history or ("",) * number)[number]
        result = [f"layer {number} ({text})"]
        with ExitStack() as stack:
            trees = [overlay.merge([read_layer(path, stack)]) for _, path in (left, right)]
            found = list(overlay.changes(trees[0], overlay.difference(*trees)))
        result += [f"{kind} {printable(path)}" for kind, path in found[:SHOWN]]
        return [*result, f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else result
    return [f"it has {len(other.manifest.layers)} layers instead of {len(one.manifest.layers)}"]
