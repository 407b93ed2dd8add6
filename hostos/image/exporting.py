"""Writes images where a web server serves them: `hostos.live.web_seeds` says how that directory looks."""

from __future__ import annotations

import shutil
from pathlib import Path

from hostos.errors import UserError, failure
from hostos.image.store import Store, StoredImage
from hostos.steps import Steps


def export(store: Store, image: StoredImage, directory: Path, steps: Steps) -> int:
    """Write an image below `directory`, which may hold others; bytes written (what is there is kept).

    Layers come first and the manifest last, so that what a client finds is whole. Raises UserError.
    """
    if image.missing:
        raise UserError(f"layers of image {image.name} are missing in the store", "publish it again")
    bundle = store.bundle(image.hash)
    place = directory / "images" / image.hash
    written = 0
    try:
        with steps.step("export") as step:
            for layer in bundle.manifest.layers:
                target = directory / "layers" / layer.torrent / layer.file
                if target.is_file() and target.stat().st_size == layer.size:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                step.progress(f"{layer.size >> 20} MiB")
                new = target.with_name(f".{target.name}.new")
                shutil.copyfile(store.layer_path(layer), new)
                new.replace(target)
                written += layer.size
            for path, data in sorted(bundle.files.items(), key=lambda item: item[0] == "manifest.json"):
                target = place / path
                target.parent.mkdir(parents=True, exist_ok=True)
                new = target.with_name(f".{target.name}.new")
                new.write_bytes(data)
                new.replace(target)
                written += len(data)
            step.detail = str(directory)
    except OSError as error:
        raise failure(f"{error.filename or directory}: {error.strerror}", "give another directory") from None
    return written
