"""Indexes: one hash for images of several architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hostos.cli import live
from hostos.cli.image import image as image_commands
from hostos.errors import UserError
from hostos.image import indexes
from hostos.image.store import Store
from hostos.live import index as format_of
from hostos.live.index import INDEX_FILE, Index
from hostos.live.manifest import Layer, Manifest
from hostos.live.torrents import make_image_torrent, make_layer_torrent

ARM, X86 = "a" * 64, "b" * 64
GOOD = Index("web/debian", {"x86_64": X86, "aarch64": ARM})


def test_the_one_spelling() -> None:
    assert GOOD.to_json() == (
        b'{"images":{"aarch64":"' + ARM.encode() + b'","x86_64":"' + X86.encode() + b'"},'
        b'"kind":"hostos-index","name":"web/debian","schema":1}\n'
    )
    assert format_of.parse(GOOD.to_json()) == GOOD
    # Part of the format: what is published today must have this hash for ever.
    assert GOOD.torrent().info_hash == Index("web/debian", {"aarch64": ARM, "x86_64": X86}).torrent().info_hash
    assert GOOD.torrent().name == "hostos-image"


def test_the_image_for_a_machine() -> None:
    assert GOOD.choose("aarch64") == ARM
    assert Index("x1", {"any": X86}).choose("riscv64") == X86
    with pytest.raises(UserError, match="is there for aarch64, x86_64, this machine is riscv64") as caught:
        GOOD.choose("riscv64")
    assert "hostos up -m NAME --arch aarch64" in str(caught.value.hint)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": True},
        {"extra": 1},
        {"name": "../x"},
        {"name": 3},
        {"images": {}},
        {"images": []},
        {"images": {"x86_64": "short"}},
        {"images": {"x86_64": 5}},
        {"images": {"X86": X86}},
        {"images": {f"a{n}": X86 for n in range(33)}},
    ],
)
def test_what_is_malformed_is_refused(change: dict[str, Any]) -> None:
    data = {**json.loads(GOOD.to_json()), **change}
    with pytest.raises(UserError, match="index|image name"):
        format_of.parse(json.dumps(data, sort_keys=True, separators=(",", ":")).encode() + b"\n")


def test_another_spelling_is_refused() -> None:
    with pytest.raises(UserError, match="canonical"):
        format_of.parse(json.dumps(json.loads(GOOD.to_json())).encode())


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda x: json.dumps(x).encode()))
def test_anything_else_is_no_index(data: bytes) -> None:
    with pytest.raises(UserError, match="index"):
        format_of.parse(data)


def test_an_index_is_proved_by_its_hash() -> None:
    files = {INDEX_FILE: GOOD.to_json()}
    assert format_of.verify(GOOD.torrent().info_hash, files) == GOOD
    with pytest.raises(UserError, match="instead of"):
        format_of.verify(ARM, files)
    assert format_of.verify(ARM, {"manifest.json": b"{}", "layers/0.torrent": b""}) is None


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with an image for each architecture; `Store()` finds it."""
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))
    made = Store()
    for architecture in ("x86_64", "aarch64"):
        with made.incoming() as place:
            file = place / "layer"
            file.write_bytes(architecture.encode() * 100)
            torrent = make_layer_torrent(file)
            layer = Layer(torrent.info_hash, torrent.size, torrent.name)
            made.add(Manifest(f"debian-{architecture.replace('_', '-')}", architecture, (layer,)), [(torrent, file)])
    return made


def invoke(*words: str) -> str:
    done = CliRunner().invoke(image_commands, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_publishing_finding_and_removing(store: Store) -> None:
    made = invoke("index", "debian", "debian-x86-64", "debian-aarch64").strip()
    assert invoke("index", "debian", "debian-aarch64", "debian-x86-64").strip() == made
    for reference in (made, made[:10], "debian", f"magnet:?xt=urn:btmh:1220{made}"):
        found = indexes.find(store, reference)
        assert found is not None
        assert found.hash == made
    assert indexes.find(store, "debian-aarch64") is None
    listed = json.loads(invoke("ls", "--json"))
    assert [each["index"] for each in listed["indexes"]] == [made]
    assert len(listed["images"]) == 2
    assert listed["broken"] == []
    assert "aarch64+x86_64" in invoke("ls")
    assert "debian-aarch64" in invoke("inspect", "debian")
    assert json.loads(invoke("inspect", made, "--json"))["images"].keys() == {"aarch64", "x86_64"}
    invoke("rm", "debian")
    assert indexes.all_indexes(store) == []
    assert len(store.images()) == 2


def test_two_images_of_one_architecture_are_refused(store: Store) -> None:
    with store.incoming() as place:
        (place / "layer").write_bytes(b"other")
        torrent = make_layer_torrent(place / "layer")
        layer = Layer(torrent.info_hash, torrent.size, torrent.name)
        store.add(Manifest("other", "aarch64", (layer,)), [(torrent, place / "layer")])
    with pytest.raises(UserError, match="both for aarch64"):
        indexes.publish(store, "mixed", ("debian-aarch64", "other"))


def test_a_damaged_index_is_not_listed(store: Store) -> None:
    found = indexes.publish(store, "debian", ("debian-aarch64",))
    (found.directory / INDEX_FILE).write_bytes(b"{}")
    assert indexes.all_indexes(store) == []


def test_the_host_hands_over_the_image_of_the_machines_architecture(store: Store) -> None:
    made = indexes.publish(store, "debian", ("debian-aarch64", "debian-x86-64"))
    wanted = live.resolve("debian", ("192.0.2.1:1",))
    assert (wanted.image, wanted.bundle) == (made.hash, None)
    for architecture in ("aarch64", "x86_64"):
        chosen = wanted.for_machine(architecture)
        assert chosen.image == made.index.images[architecture]
        assert chosen.bundle is not None
        assert chosen.bundle.manifest.architecture == architecture
        # Asked again, of the machine that came up, it is the same.
        assert chosen.for_machine(architecture) == chosen
    with pytest.raises(UserError, match="this machine is riscv64"):
        wanted.for_machine("riscv64")


def test_an_image_for_another_machine_says_what_to_do(store: Store) -> None:
    wanted = live.resolve("debian-aarch64", ())
    assert wanted.for_machine("aarch64") == wanted
    with pytest.raises(UserError, match="image debian-aarch64 is for aarch64, this machine is x86_64") as caught:
        wanted.for_machine("x86_64")
    assert "hostos up -m aarch64 --arch aarch64" in str(caught.value.hint)
    assert "hostos container boot -m aarch64 debian-aarch64" in str(caught.value.hint)


def test_an_image_is_no_index(store: Store) -> None:
    bundle = store.bundle("debian-aarch64")
    assert format_of.verify(bundle.image, bundle.files) is None
    assert make_image_torrent(bundle.manifest, [each.data for each in bundle.layers])[0].info_hash == bundle.image
