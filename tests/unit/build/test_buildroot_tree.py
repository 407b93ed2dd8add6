"""What of Buildroot's root file system goes into the image."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path
from posixpath import dirname

import pytest

from hostos.build.engines import buildroot_tree
from hostos.build.engines.buildroot_tree import left_out, translate
from hostos.build.profile import load_profile
from hostos.errors import UserError

LIBRARY = "usr/lib/python3.14"
IMPORTED = """
import importlib, pkgutil, sys, hostos.live
for module in pkgutil.iter_modules(hostos.live.__path__):
    importlib.import_module(f"hostos.live.{module.name}")
print(*(name for name in sys.modules if not name.startswith("hostos")))
"""


@pytest.mark.parametrize(
    ("path", "left"),
    [
        (f"{LIBRARY}/profile.pyc", True),
        (f"{LIBRARY}/site-packages/somebody/profile.pyc", False),
        (f"{LIBRARY}/asyncio/events.pyc", True),
        (f"{LIBRARY}/site-packages/trio/_core/_tests", True),
        (f"{LIBRARY}/encodings/cp1252.pyc", True),
        (f"{LIBRARY}/encodings/utf_8.pyc", False),
        ("usr/lib/libcrypto.so.3", False),
    ],
)
def test_the_features_drop_lists_hold_for_byte_code(path: str, left: bool) -> None:
    assert _left_out(path) is left


def test_nothing_the_live_boot_client_imports_is_left_out() -> None:
    shown = subprocess.run([sys.executable, "-I", "-c", IMPORTED], capture_output=True, text=True, check=True).stdout
    modules = shown.split()
    assert {"trio", "libtorrent", "json", "idna"} <= set(modules)
    lost = []
    for module in modules:
        name = module.replace(".", "/")
        for directory in (LIBRARY, f"{LIBRARY}/site-packages"):
            lost += [
                path for path in (f"{directory}/{name}.pyc", f"{directory}/{name}/__init__.pyc") if _left_out(path)
            ]
    assert lost == []


def test_the_programs_features_name_stay_and_others_do_not(tmp_path: Path) -> None:
    profile = load_profile("minimal", "x86_64")
    tar = tmp_path / "rootfs.tar"
    files = ("usr/bin/mount", "usr/bin/whatever", "usr/share/misc/magic", "etc/services", "etc/other")
    with tarfile.open(tar, "w") as archive:
        for name in files:
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode, entry.uid = 4, 0o755, 1000
            archive.addfile(entry, io.BytesIO(b"#!x\n"))
    applets = "\n".join(f"/bin/{name}" for feature in profile.features for name in feature.busybox)
    tree = buildroot_tree.collect(tar, profile, applets)
    assert set(files) & tree.entries.keys() == {"usr/bin/mount", "etc/services"}
    assert tree.entries["usr/bin/mount"].uid == 0


def test_a_program_busybox_lacks_is_named() -> None:
    profile = load_profile("minimal", "x86_64")
    asked = sorted(name for feature in profile.features for name in feature.busybox)
    links = "\n".join(f"/bin/{name}" for name in asked[:-1])
    with pytest.raises(UserError, match=rf"without {asked[-1]}, which .*\.toml asks for"):
        buildroot_tree.check_busybox(profile, links)


@cache
def _dropped() -> re.Pattern[str]:
    features = load_profile("default", "x86_64").features
    patterns = [*left_out(), *(translate(each) for feature in features for each in feature.debian.drop)]
    return buildroot_tree._pattern(patterns)


def _left_out(path: str) -> bool:
    while path:
        if _dropped().match(path):
            return True
        path = dirname(path)
    return False
