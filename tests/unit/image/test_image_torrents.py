"""Torrents, references and bundles, against libtorrent and against tampering."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import warnings
from pathlib import Path
from typing import Any

import libtorrent
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.image.publish import default_piece_size
from hostos.live.manifest import BootConfig, Layer, Manifest
from hostos.live.torrents import (
    ImageBundle,
    Torrent,
    image_torrent,
    make_image_torrent,
    make_layer_torrent,
    parse_image_reference,
    parse_layer_torrent,
    parse_peer,
    verify_bundle,
    verify_files,
)
from hostos.live.trace import Range, Trace, Workload

TRACE = Trace((Workload(("id",), (Range(0, 0, 2), Range(0, 4, 1))),))
SIZES = [1, 16383, 16384, 16385, 65535, 65536, 65537, 131072, 200_000, 1 << 20, (1 << 20) + 1]


def layer(tmp_path: Path, size: int = 200_000, seed: int = 1, piece_size: int = 65536) -> Torrent:
    path = tmp_path / f"content-{seed}"
    path.write_bytes(random.Random(seed).randbytes(size))
    return make_layer_torrent(path, piece_size=piece_size)


def bundle(tmp_path: Path, *, layers: int = 2) -> ImageBundle:
    torrents = [layer(tmp_path, 70_000 + n, n) for n in range(layers)]
    manifest = Manifest(
        "test", "x86_64", tuple(Layer(t.info_hash, t.size, t.name) for t in torrents), BootConfig(("id",))
    )
    made, files = make_image_torrent(manifest, [t.data for t in torrents], trace=TRACE.to_json())
    return verify_files(made.info_hash, files)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece_size", [16384, 65536, 1 << 20])
def test_libtorrent_makes_the_same_hashes(tmp_path: Path, size: int, piece_size: int) -> None:
    torrent = layer(tmp_path, size, piece_size=piece_size)
    (tmp_path / "content-1").rename(tmp_path / torrent.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        files = libtorrent.file_storage()
        libtorrent.add_files(files, str(tmp_path / torrent.name))
        flags = libtorrent.create_torrent.v2_only | libtorrent.create_torrent.no_attributes
        other = libtorrent.create_torrent(files, piece_size, flags)
        libtorrent.set_piece_hashes(other, str(tmp_path))
        generated: Any = other.generate()
    ours: Any = libtorrent.bdecode(torrent.data)
    assert ours[b"info"] == generated[b"info"]
    assert ours[b"piece layers"] == generated[b"piece layers"]
    loaded = libtorrent.torrent_info(ours)
    assert str(loaded.info_hashes().v2) == torrent.info_hash
    assert not loaded.info_hashes().has_v1()
    assert parse_layer_torrent(torrent.data) == torrent


def test_content_alone_decides_the_hash(tmp_path: Path) -> None:
    first = layer(tmp_path)
    (tmp_path / "elsewhere").write_bytes((tmp_path / "content-1").read_bytes())
    assert make_layer_torrent(tmp_path / "elsewhere") == first
    (tmp_path / "elsewhere").write_bytes((tmp_path / "content-1").read_bytes() + b"x")
    assert make_layer_torrent(tmp_path / "elsewhere").info_hash != first.info_hash
    assert set(libtorrent.bdecode(first.data)) == {b"info", b"piece layers"}  # no dates, no trackers


def test_hashes_are_pinned(tmp_path: Path) -> None:
    """The formats may not change by accident: that would rename every image there is."""
    torrent = layer(tmp_path, 100_000)
    assert torrent.info_hash == "862f485105c1f8b5119a825e268219907a6cf5d6d19c70f372fe4baa191727d3"
    manifest = Manifest("pinned", "x86_64", (Layer(torrent.info_hash, torrent.size, torrent.name),))
    assert (
        make_image_torrent(manifest, [torrent.data])[0].info_hash
        == "a4c622102a9147f2e242d28a0ef54a9c4209a9d14a46e88bc0aa4dce3e1797a8"
    )


@pytest.mark.parametrize(
    ("size", "kib"), [(1, 64), (124 << 20, 64), (1 << 30, 64), ((1 << 30) + 1, 128), (16 << 30, 256), (1 << 40, 2048)]
)
def test_the_piece_size_keeps_the_torrent_small(size: int, kib: int) -> None:
    assert default_piece_size(size) == kib << 10
    # Hashes of all pieces: at 50 Mbit/s at most 0.4 s for 16 GiB.
    assert 32 * size / (kib << 10) <= max(2 << 20, size / 8192 / 8)


@pytest.mark.parametrize("piece_size", [0, 1, 8192, 65535, 1 << 25])
def test_impossible_piece_sizes(tmp_path: Path, piece_size: int) -> None:
    with pytest.raises(UserError, match="piece size"):
        layer(tmp_path, piece_size=piece_size)


def test_an_empty_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        layer(tmp_path, 0)


# --- references ---


@given(st.text("0123456789abcdefABCDEF", min_size=64, max_size=64).filter(lambda text: text.strip("0")))
def test_hash_references(text: str) -> None:
    assert parse_image_reference(f" {text}\n").info_hash == text.lower()


@given(
    st.binary(min_size=32, max_size=32).filter(any),
    st.lists(st.tuples(st.sampled_from(["10.0.2.2", "seed.example.org", "[::1]"]), st.integers(1, 65535)), unique=True),
)
def test_magnets_are_read_back(digest: bytes, endpoints: list[tuple[str, int]]) -> None:
    peers = tuple(f"{host}:{port}" for host, port in endpoints)
    link = Torrent(b"", digest.hex(), "a name&=", 1, 65536).magnet(peers)
    assert parse_image_reference(link).info_hash == digest.hex()
    assert parse_image_reference(link).peers == peers
    # Any client must read it the same way.
    parsed = libtorrent.parse_magnet_uri(link)
    assert str(parsed.info_hashes.v2) == digest.hex()


@given(st.text(max_size=100))
def test_any_text_is_taken_or_refused_politely(text: str) -> None:
    for candidate in (text, "magnet:?" + text, f"magnet:?xt=urn:btmh:1220{'ab' * 32}&{text}"):
        try:
            reference = parse_image_reference(candidate)
        except UserError:
            continue
        assert len(reference.info_hash) == 64


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a" * 40, "v1 hash"),
        ("a" * 63, "63 hex digits"),
        ("debian", "not an image"),
        ("0" * 64, "nothing but zeros"),
        (f"magnet:?xt=urn:btmh:1220{'0' * 64}", "nothing but zeros"),
        ("", "not an image"),
        ("http://example.org/" + "a" * 64, "not an image"),
        (f"magnet:?xt=urn:btih:{'a' * 40}", "v1 hash"),
        ("magnet:?dn=x", "names 0 images"),
        (f"magnet:?xt=urn:btmh:1220{'a' * 63}", "names 0 images"),
        (f"magnet:?xt=urn:btmh:1220{'a' * 64}&xt=urn:btmh:1220{'b' * 64}", "names 2 images"),
        (f"magnet:?xt=urn:btmh:1220{'a' * 64}&x.pe=nowhere", "peer's address"),
    ],
)
def test_bad_references(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_image_reference(text)


def test_a_hybrid_magnet_names_the_v2_image() -> None:
    link = f"magnet:?xt=urn:btih:{'c' * 40}&xt=urn:btmh:1220{'A' * 64}&tr=udp%3A%2F%2Ft.example%3A1"
    assert parse_image_reference(link).info_hash == "a" * 64


@pytest.mark.parametrize(
    "text", ["a:0", "a:65536", ":1", "a", "::1:5", "[::g]:1", "a b:1", "-a:1", "a:+1", "a" * 254 + ":1"]
)
def test_bad_peers(text: str) -> None:
    with pytest.raises(UserError, match="peer's address"):
        parse_peer(text)


# --- layer torrents of strangers ---


def test_no_changed_byte_of_a_torrent_goes_unnoticed(tmp_path: Path) -> None:
    good = layer(tmp_path)
    for position in range(len(good.data)):
        for flip in (0x01, 0x80):
            data = bytearray(good.data)
            data[position] ^= flip
            with contextlib.suppress(UserError):
                assert parse_layer_torrent(bytes(data)).info_hash != good.info_hash


@given(st.binary(max_size=200))
def test_noise_is_no_torrent(data: bytes) -> None:
    with pytest.raises(UserError):
        parse_layer_torrent(data)


def rebuilt(good: Torrent, change: Any) -> bytes:
    decoded: Any = libtorrent.bdecode(good.data)
    change(decoded)
    return libtorrent.bencode(decoded)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({b"announce": b"udp://tracker.example:1"}),
        lambda t: t.update({b"piece layers": {}}),
        lambda t: t[b"piece layers"].update({b"x" * 32: b"y" * 64}),
        lambda t: t[b"info"].update({b"private": 1}),
        lambda t: t[b"info"].update({b"meta version": 3}),
        lambda t: t[b"info"].update({b"name": b"../evil"}),
        lambda t: t[b"info"].update({b"piece length": 1000}),
        lambda t: t[b"info"].update({b"piece length": b"65536"}),
        lambda t: t[b"info"].update({b"pieces": b""}),
        lambda t: t[b"info"][b"file tree"].update({b"second": {b"": {b"length": 0}}}),
        lambda t: t.pop(b"info"),
        lambda t: t.update({b"info": 1}),
        lambda t: t[b"info"].update({b"file tree": []}),
    ],
)
def test_torrents_with_anything_more_or_less_are_refused(tmp_path: Path, change: Any) -> None:
    with pytest.raises(UserError, match="layer torrent|piece size"):
        parse_layer_torrent(rebuilt(layer(tmp_path), change))


def test_only_the_canonical_spelling_is_taken(tmp_path: Path) -> None:
    good = layer(tmp_path)
    for data in (good.data + b"\n", good.data.replace(b"i65536e", b"i065536e"), b"d" * 100_000, b"l" * 100_000):
        with pytest.raises(UserError):
            parse_layer_torrent(data)


# --- bundles ---


def test_a_bundle_is_read_back(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    assert verify_bundle(made.to_json()) == made
    assert verify_bundle(made.to_json(), image=made.image) == made
    assert verify_bundle(json.loads(made.to_json())) == made
    assert made.trace == TRACE
    assert [t.info_hash for t in made.layers] == [item.torrent for item in made.manifest.layers]
    with pytest.raises(UserError, match="instead of"):
        verify_bundle(made.to_json(), image="0" * 64)


def test_libtorrent_reads_the_image_torrent(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    decoded: Any = libtorrent.bdecode(made.torrent.data)
    assert str(libtorrent.torrent_info(decoded).info_hashes().v2) == made.image


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_tampering_with_any_byte_of_any_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    made = bundle(tmp_path)
    path = data.draw(st.sampled_from(sorted(made.files)))
    content = bytearray(made.files[path])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    tampered = json.loads(made.to_json())
    tampered["files"][path] = base64.b64encode(content).decode()
    with pytest.raises(UserError):
        verify_bundle(tampered)


def test_exchanged_parts_are_refused(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    files = made.files
    zero, one = files["layers/0.torrent"], files["layers/1.torrent"]
    swapped = {**files, "layers/0.torrent": one, "layers/1.torrent": zero}
    for changed in (
        swapped,
        {path: data for path, data in files.items() if path != "layers/1.torrent"},
        {path: data for path, data in files.items() if path != "trace.json"},
        {**files, "layers/2.torrent": files["layers/0.torrent"]},
        {**files, "../evil": b"x"},
        {},
    ):
        with pytest.raises(UserError):
            verify_files(made.image, changed)
        # A hash that fits the changed files doesn't help either, unless they are a sound image.
        honest = image_torrent(changed).info_hash if "../evil" not in changed else made.image
        if "trace.json" in changed or not changed:
            with pytest.raises(UserError):
                verify_files(honest, changed)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2}, {"schema": "1"}, {"image": "0" * 64}, {"image": 1}, {"image": "A" * 64}, {"files": []},
        {"files": {"manifest.json": 1}}, {"files": {"manifest.json": "!"}}, {"torrent": ""}, {"torrent": 1},
        {"more": 1},
    ],
)  # fmt: skip
def test_malformed_bundles(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        verify_bundle({**json.loads(bundle(tmp_path).to_json()), **change})


@given(
    st.one_of(
        st.binary(max_size=100), st.dictionaries(st.sampled_from(["schema", "image", "files"]), st.integers(0, 2))
    )
)
def test_noise_is_no_bundle(data: Any) -> None:
    with pytest.raises(UserError):
        verify_bundle(data)


def test_a_manifest_that_names_another_layer_is_refused(tmp_path: Path) -> None:
    first, second = layer(tmp_path, seed=1), layer(tmp_path, seed=2)
    manifest = Manifest("test", "x86_64", (Layer(first.info_hash, first.size, first.name),))
    with pytest.raises(UserError, match="layer 0"):
        make_image_torrent(manifest, [second.data])
