"""Manifests: what is written is read back, and nothing else is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.live.manifest import BootConfig, Layer, Manifest, check_name

HEX = "0123456789abcdef"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
layers = st.builds(
    Layer,
    torrent=st.text(HEX, min_size=64, max_size=64),
    size=st.integers(1, 1 << 40),
    file=st.text(HEX, min_size=16, max_size=16).map(lambda name: f"hostos-{name}.squashfs"),
)
boots = st.builds(
    BootConfig,
    command=st.lists(texts.filter(bool), max_size=4).map(tuple),
    env=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,10}", fullmatch=True), texts, max_size=4).map(
        lambda items: tuple(items.items())
    ),
    user=st.sampled_from(["", "root", "1000", "www-data:33"]),
    workdir=st.sampled_from(["", "/", "/srv/a b"]),
    ports=st.lists(st.integers(1, 65535), unique=True, max_size=3).map(lambda ns: tuple(f"{n}/udp" for n in ns)),
)
manifests = st.builds(
    Manifest,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}z", fullmatch=True),
    architecture=st.sampled_from(["x86_64", "aarch64"]),
    layers=st.lists(layers, min_size=1, max_size=4, unique_by=lambda layer: layer.torrent).map(tuple),
    boot=boots,
)


@given(manifests)
def test_what_is_written_is_read_back(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.parse(text) == manifest
    assert Manifest.parse(text).to_json() == text


@given(manifests)
def test_the_order_of_variables_does_not_matter(manifest: Manifest) -> None:
    boot = BootConfig(env=tuple(reversed(manifest.boot.env)))
    assert boot == BootConfig(env=manifest.boot.env)


@given(st.binary(max_size=300))
def test_noise_is_refused_politely(data: bytes) -> None:
    with pytest.raises(UserError):
        Manifest.parse(data)


GOOD: dict[str, Any] = json.loads(
    Manifest(
        "web/debian",
        "x86_64",
        (Layer("ab" * 32, 4096, "hostos-0123456789abcdef.squashfs"),),
        BootConfig(("nginx",), (("LANG", "C"),), "www-data", "/srv", ("80/tcp",)),
    ).to_json()
)
junk = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just([1]),
    st.just({"a": 1}), st.just("../x"), st.just("a\0b"), st.just("\ud800"),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@given(st.data())
def test_junk_in_any_place_is_refused_or_means_what_it_says(data: st.DataObject) -> None:
    manifest = json.loads(json.dumps(GOOD))
    place = data.draw(st.sampled_from([place for place in places(GOOD) if place]))
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = data.draw(junk)
    try:
        parsed = Manifest.parse(json.dumps(manifest).encode())
    except UserError:
        return
    # Taken: then it must be a spelling of what was given, nothing dropped or turned into something else.
    again = json.loads(parsed.to_json())
    manifest["boot"] = {key: value for key, value in manifest["boot"].items() if value}
    assert again == manifest


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": True}, "schema"),
        ({"kind": "other"}, "kind"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"layers": []}, "0 layers"),
        ({"layers": GOOD["layers"] * 2}, "twice"),
        ({"layers": [{**GOOD["layers"][0], "file": "../../etc/passwd"}]}, "file name"),
        ({"layers": [{**GOOD["layers"][0], "size": 1.0}]}, "size"),
        ({"layers": [{**GOOD["layers"][0], "format": "ext4"}]}, "ext4"),
        ({"boot": {"privileged": True}}, "unknown key 'privileged'"),
        ({"boot": {"workdir": "/a/../b"}}, "absolute"),
        ({"boot": {"env": {"A=B": "c"}}}, "environment variable"),
        ({"boot": {"user": "a b"}}, "user"),
        ({"boot": {"ports": ["99999/tcp"]}}, "port"),
        ({"boot": {"command": [""]}}, "first word"),
    ],
)
def test_each_fault_is_named(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Manifest.parse(json.dumps({**GOOD, **change}).encode())


@pytest.mark.parametrize("extra", ["", '"schema":1,'])
def test_a_key_may_not_come_twice(extra: str) -> None:
    text = "{" + extra + json.dumps(GOOD)[1:]
    if not extra:
        Manifest.parse(text.encode())
        return
    with pytest.raises(UserError, match="not JSON"):
        Manifest.parse(text.encode())


def test_deep_nesting_and_size_are_bounded() -> None:
    with pytest.raises(UserError, match="not JSON"):
        Manifest.parse(b"[" * 200_000)
    with pytest.raises(UserError, match="more than"):
        Manifest.parse(b" " * 300_000)
    with pytest.raises(UserError, match="at most"):
        Manifest(
            "n-z", "x86_64", Manifest.parse(json.dumps(GOOD).encode()).layers, BootConfig(("x" * 130_000,) * 3)
        ).to_json()


@pytest.mark.parametrize("name", ["debian", "web/debian-13", "a", "A.b_c", "deadbeeg"])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-x", "a b", "../x", "a//b", "a/", "a/../b", "a..b", "deadbeef", "x" * 129, "ä", "a\n"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(UserError, match="name"):
        check_name(name)
