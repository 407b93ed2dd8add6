"""Private images: keys, the cipher, the manifest, and links that hold a key."""

from __future__ import annotations

import io
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from hostos.cli.links import link, read_link
from hostos.errors import UserError
from hostos.image import privacy
from hostos.image.store import Store
from hostos.live import dmcrypt
from hostos.live.manifest import Layer, Manifest
from hostos.live.private import CIPHER, SECTOR, key_to_text, layer_key, parse_key
from hostos.live.torrents import make_layer_torrent
from hostos.steps import Steps

KEY = bytes(range(32))
HASH = "ab" * 32


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOSTOS_HOME", str(tmp_path / "home"))


@given(st.binary(min_size=32, max_size=32))
def test_keys_are_read_back(key: bytes) -> None:
    assert parse_key(key_to_text(key)) == key
    assert parse_key(f" {key_to_text(key)}\n") == key


@pytest.mark.parametrize("text", ["", "x", "A" * 42, "A" * 44, "A" * 42 + "=", "A" * 42 + "\n", "é" * 43])
def test_what_is_no_key_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_key(text)
    assert not text.strip() or text not in caught.value.message + caught.value.hint


@given(st.binary(min_size=32, max_size=32), st.integers(0, 63))
def test_layer_keys_are_those_of_rfc_5869(key: bytes, number: int) -> None:
    expanded = HKDFExpand(hashes.SHA256(), 64, b"hostos layer %d" % number).derive(key)
    assert layer_key(key, number) == expanded


@pytest.mark.parametrize("size", [1, SECTOR - 1, SECTOR, SECTOR + 1, 3 * SECTOR, (1 << 20) + 5])
def test_sectors_are_decrypted_one_by_one(tmp_path: Path, size: int) -> None:
    plain, secret, key = tmp_path / "plain", tmp_path / "secret", layer_key(KEY, 0)
    content = os.urandom(size)
    plain.write_bytes(content)
    privacy.encrypt_file(plain, secret, key)
    data = secret.read_bytes()
    assert len(data) == -(-size // SECTOR) * SECTOR
    found = b""
    for number in range(len(data) // SECTOR):
        tweak = struct.pack("<QQ", number, 0)
        decryptor = Cipher(algorithms.AES(key), modes.XTS(tweak)).decryptor()
        found += decryptor.update(data[number * SECTOR : (number + 1) * SECTOR]) + decryptor.finalize()
    assert found == content + bytes(len(data) - size)


def published(store: Store, tmp_path: Path) -> str:
    with store.incoming() as temporary:
        file = temporary / "layer"
        file.write_bytes(b"hsqs, and nobody shall read it" * 1000)
        torrent = make_layer_torrent(file)
        layer = Layer(torrent.info_hash, torrent.size, torrent.name)
        return store.add(Manifest("web/secret", "x86_64", (layer,)), [(torrent, file)])


def test_an_image_is_encrypted_and_its_key_is_nowhere_in_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    plain = store.get(published(store, tmp_path))
    made = [store.get(privacy.encrypt(store, plain, Steps())) for _ in range(2)]
    assert made[0].hash != made[1].hash
    for image in made:
        key = privacy.key_of(image.hash)
        assert key
        assert [layer.cipher for layer in image.manifest.layers] == [CIPHER]
        files = [path for path in store.root.rglob("*") if path.is_file()]
        assert not [
            path for path in files if key_to_text(key).encode() in path.read_bytes() or key in path.read_bytes()
        ]
        assert b"nobody" not in store.layer_path(image.manifest.layers[0]).read_bytes()
        with pytest.raises(UserError, match="private already"):
            privacy.encrypt(store, image, Steps())
        # The link is the only way out.
        text = link(image, ("192.0.2.7:6881",), ("http://192.0.2.7/x",))
        (tmp_path / "link").write_text(text + "\n")
        assert read_link(f"@{tmp_path}/link") == (text.partition("#")[0], key)
        privacy.forget(image.hash)
        with pytest.raises(UserError, match="not on this host"):
            link(image, (), ())


def test_manifests_say_how_and_old_ones_stay_as_they_are() -> None:
    layer = Layer(HASH, 2 * SECTOR, "hostos-" + "0" * 16 + ".squashfs")
    plain = Manifest("a", "x86_64", (layer,))
    assert b"cipher" not in plain.to_json()
    secret = replace(plain, layers=(replace(layer, cipher=CIPHER),))
    assert Manifest.parse(secret.to_json()) == secret
    for bad in (b'"cipher":"rot13"', b'"cipher":""', b'"cipher":7'):
        with pytest.raises(UserError, match="cipher"):
            Manifest.parse(secret.to_json().replace(b'"cipher":"%s"' % CIPHER.encode(), bad))
    with pytest.raises(UserError, match="whole number of sectors"):
        replace(layer, cipher=CIPHER, size=SECTOR + 1)


def test_a_key_on_the_command_line_is_refused() -> None:
    with pytest.raises(UserError, match="seen by everybody") as caught:
        read_link(f"magnet:?xt=urn:btmh:1220{HASH}#{key_to_text(KEY)}")
    assert key_to_text(KEY) not in caught.value.message + caught.value.hint
    assert read_link("web/debian") == ("web/debian", None)


def test_a_link_on_standard_input_leaves_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "input"
    file.write_text(f"{HASH}#{key_to_text(KEY)}\nfor the container\n")
    with file.open("rb", buffering=0) as raw:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(raw)))
        assert read_link("@-") == (HASH, KEY)
        assert raw.read() == b"for the container\n"


@pytest.mark.parametrize("content", ["", "#" + "A" * 43, "two\nlines", "hash#short"])
def test_what_is_no_link_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "link").write_text(content)
    with pytest.raises(UserError):
        read_link(f"@{tmp_path}/link")
    with pytest.raises(UserError, match="No such file"):
        read_link(f"@{tmp_path}/none")


def test_the_table_of_a_device_has_no_key() -> None:
    table = dmcrypt.target("/dev/loop3", 16, "hostos:abc")
    assert len(table) % 8 == 0
    start, sectors, status, size, kind = struct.unpack_from("<QQiI16s", table)
    assert (start, sectors, status, size, kind.rstrip(b"\0")) == (0, 16, 0, len(table), b"crypt")
    words = table[40:].rstrip(b"\0").decode()
    assert words == "aes-xts-plain64 :64:logon:hostos:abc 0 /dev/loop3 0 2 sector_size:4096 iv_large_sectors"
