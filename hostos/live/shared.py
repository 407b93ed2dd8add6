"""The metadata of images in use, offered to other peers as their layers are.

Who has only an image's hash begins with its metadata; without this it would end with the host that published it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import libtorrent as lt

from hostos.live.session import Swarm
from hostos.live.torrents import ImageBundle


class Shared:
    """`directory`: where the files of each image are, below its hash."""

    def __init__(self, swarm: Swarm, directory: Path) -> None:
        self._swarm, self._directory = swarm, directory
        self._users: dict[str, int] = {}
        self._handles: dict[str, Any] = {}

    def begin(self, bundle: ImageBundle) -> None:
        """One more uses this image, whose files are there."""
        self._users[bundle.image] = self._users.get(bundle.image, 0) + 1
        if bundle.image not in self._handles:
            self._handles[bundle.image] = self._swarm.session.add_torrent(self._parameters(bundle))

    def end(self, image: str) -> None:
        """One fewer."""
        self._users[image] -= 1
        if not self._users[image]:
            del self._users[image]
            self.withdraw(image)

    def withdraw(self, image: str) -> None:
        """Offer it no longer, whoever uses it."""
        if (handle := self._handles.pop(image, None)) is not None:
            self._swarm.session.remove_torrent(handle)

    def _parameters(self, bundle: ImageBundle) -> Any:
        parameters = lt.add_torrent_params()
        parameters.ti = lt.torrent_info(bundle.torrent.data)
        parameters.save_path = str(self._directory / bundle.image)
        files = parameters.ti.files()
        # In the cache the files lie there without the torrent's own name.
        parameters.renamed_files = {
            index: files.file_path(index).partition("/")[2]
            for index in range(files.num_files())
            if not files.file_flags(index) & lt.file_storage.flag_pad_file
        }
        # Taken as complete; each piece is hashed all the same before it is sent for the first time.
        parameters.flags |= lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
        parameters.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        return parameters
