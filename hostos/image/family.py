"""Who inherits from whom, among the images of a store."""

from __future__ import annotations

from collections.abc import Sequence

from hostos.image.store import StoredImage


def roots(images: Sequence[StoredImage]) -> list[StoredImage]:
    """Those whose parent is not among them, by name."""
    hashes = {image.hash for image in images}
    return sorted(
        (image for image in images if not image.manifest.parents or image.manifest.parents[0] not in hashes),
        key=lambda image: (image.name, image.hash),
    )


def children(image: StoredImage, images: Sequence[StoredImage]) -> list[StoredImage]:
    """Those made directly from `image`, by name."""
    found = [each for each in images if each.manifest.parents[:1] == (image.hash,)]
    return sorted(found, key=lambda each: (each.name, each.hash))


def family(images: Sequence[StoredImage], image: StoredImage) -> list[StoredImage]:
    """`image`, its ancestors and its descendants."""
    return [
        each
        for each in images
        if each.hash == image.hash or each.hash in image.manifest.parents or image.hash in each.manifest.parents
    ]


def own_size(image: StoredImage, parent: StoredImage | None) -> int:
    """Bytes of the layers that `parent` does not have."""
    inherited = set(parent.manifest.layers) if parent else set()
    return sum(layer.size for layer in image.manifest.layers if layer not in inherited)


def brought_by(image: StoredImage, images: Sequence[StoredImage]) -> list[str]:
    """For each layer, the hash of the eldest ancestor that has it (or of the image itself).

    An ancestor that isn't in the store can't be asked: its layers count as those of its next known descendant.
    """
    known = {each.hash: each for each in images}
    line = [known[parent] for parent in reversed(image.manifest.parents) if parent in known]
    owners = []
    for number, layer in enumerate(image.manifest.layers):
        owner = next((each for each in line if each.manifest.layers[number : number + 1] == (layer,)), image)
        owners.append(owner.hash)
    return owners
