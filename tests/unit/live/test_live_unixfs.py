"""UnixFS: what an honest program makes is read byte for byte; what a hostile one makes is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from ipfs import DAG_PB, RAW, Store, attributes, binary, integer, node, text
from ipfs import unixfs as message

from hostos.live import cid, dagpb, unixfs
from hostos.live.dagpb import BlockError


def opened(store: Store, name: bytes) -> Any:
    return unixfs.decode(cid.from_bytes(name), store.blocks[name])


def fetcher(store: Store, asked: list[cid.Cid] | None = None) -> unixfs.Fetch:
    async def fetch(wanted: cid.Cid) -> bytes:
        if asked is not None:
            asked.append(wanted)
        if (inline := wanted.inline) is not None:
            return inline
        return store.blocks[wanted.to_bytes()]

    return fetch


def content(store: Store, name: bytes, start: int = 0, end: int = 1 << 60) -> bytes:
    return trio.run(unixfs.read, opened(store, name), start, end, fetcher(store))


def test_an_empty_file_and_a_known_cid() -> None:
    store = Store()
    name, _ = store.file(b"hello world")
    assert str(cid.from_bytes(name)) == "bafkreifzjut3te2nhyekklss27nh3k72ysco7y32koao5eei66wof36n5e"
    assert content(store, name) == b"hello world"
    assert content(store, store.file(b"", raw=False)[0]) == b""


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 3000),
    chunk=st.integers(1, 400),
    width=st.integers(2, 6),
    raw=st.booleans(),
    ranges=st.lists(st.tuples(st.integers(0, 3200), st.integers(0, 3200)), max_size=8),
)
def test_any_range_of_any_file(size: int, chunk: int, width: int, raw: bool, ranges: list[tuple[int, int]]) -> None:
    data = hashlib.shake_128(b"%d" % size).digest(size)
    store = Store()
    name, _ = store.file(data, chunk=chunk, width=width, raw=raw)
    assert opened(store, name).size == size
    for start, length in ranges:
        assert content(store, name, start, start + length) == data[start : start + length]
    assert content(store, name) == data


def test_only_the_blocks_of_a_range_are_fetched() -> None:
    store = Store()
    data = hashlib.shake_128(b"x").digest(100_000)
    name, _ = store.file(data, chunk=1000, width=10)
    asked: list[cid.Cid] = []
    assert trio.run(unixfs.read, opened(store, name), 50_500, 51_500, fetcher(store, asked)) == data[50_500:51_500]
    assert len(asked) == 3  # one node, two leaves


def test_bytes_beside_links_come_first() -> None:
    store = Store()
    leaf = store.put(RAW, b"world")
    name = store.put(DAG_PB, node([(leaf, b"", 5)], message(2, b"hello ", [5])))
    assert content(store, name) == b"hello world"
    assert content(store, name, 4, 8) == b"o wo"


def test_attributes_and_links() -> None:
    store = Store()
    found = opened(store, store.file(b"#!", extra=attributes(0o104755, 1_700_000_000))[0])
    assert (found.mode, found.mtime) == (0o4755, (1_700_000_000, 5))
    link = opened(store, store.symlink("usr/bin", attributes(0o777, -5))[0])
    assert (link.target, link.mode, link.mtime) == (b"usr/bin", 0o777, (-5, 5))
    assert opened(store, store.file(b"plain")[0]).mode is None


@pytest.mark.parametrize("sharded", [False, True])
def test_directories(sharded: bool) -> None:
    store = Store()
    children = {f"file-{number}": store.file(b"%d" % number) for number in range(700)}
    name, _ = (store.sharded if sharded else store.directory)(children)
    found = trio.run(unixfs.entries, opened(store, name), fetcher(store))
    assert {key.decode(): link.cid.to_bytes() for key, link in found.items()} == {
        key: binary_cid for key, (binary_cid, _) in children.items()
    }


# --- hostile -------------------------------------------------------------------------------------------


def refused(make: Callable[[Store], bytes], why: str) -> None:
    store = Store()
    name = make(store)

    async def everything() -> None:
        found = opened(store, name)
        if isinstance(found, unixfs.Directory):
            await unixfs.entries(found, fetcher(store))
        else:
            await unixfs.read(found, 0, found.size, fetcher(store))

    with pytest.raises(BlockError, match=why):
        trio.run(everything)


def test_sizes_that_do_not_add_up() -> None:
    leaf = b"12345"

    def parent(size: int, claimed: int, total: int | None = None) -> Callable[[Store], bytes]:
        return lambda store: store.put(
            DAG_PB, node([(store.put(RAW, leaf[:size]), b"", size)], message(2, b"", [claimed], size=total))
        )

    refused(parent(5, 6), "not as large")
    refused(parent(5, 4), "not as large")
    refused(parent(5, 5, 7), "add up")
    refused(parent(5, 1 << 50), "add up")
    refused(lambda store: store.put(DAG_PB, node([(store.put(RAW, leaf), b"", 5)], message(2))), "no sizes")


def test_a_file_too_deep() -> None:
    def make(store: Store) -> bytes:
        name = store.put(RAW, b"x")
        for _ in range(40):
            name = store.put(DAG_PB, node([(name, b"", 1)], message(2, b"", [1])))
        return name

    refused(make, "levels")


def test_the_same_block_many_times_costs_one_fetch() -> None:
    """7 levels of 100 links to one block would be 10^17 bytes: the size is refused before anything is read."""

    def make(store: Store) -> bytes:
        name, size = store.put(RAW, b"x" * 1000), 1000
        for _ in range(7):
            name, size = store.put(DAG_PB, node([(name, b"", 1)] * 100, message(2, b"", [size] * 100))), size * 100
        return name

    refused(make, "add up")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "nul\0", "x" * 256])
def test_names_no_file_has(name: str) -> None:
    refused(lambda store: store.directory({name: store.file(b"x")})[0], "entry")


def test_a_name_twice() -> None:
    def make(store: Store) -> bytes:
        leaf = store.put(RAW, b"x")
        return store.put(DAG_PB, node([(leaf, b"a", 1), (leaf, b"a", 1)], message(1)))

    refused(make, "twice")


def test_shards_that_are_none() -> None:
    data = message(5, b"\1", extra=integer(5, 0x22) + integer(6, 256))

    def below(inner: bytes) -> Callable[[Store], bytes]:
        return lambda store: store.put(DAG_PB, node([(store.put(DAG_PB, inner), b"0A", 1)], data))

    refused(below(node((), message(1))), "is none")
    refused(below(node((), message(5, extra=integer(6, 16)))), "is none")
    refused(lambda store: store.put(DAG_PB, node([(store.put(RAW, b"x"), b"0", 1)], data)), "without slots")
    for fanout in (0, 3, 4096):
        refused(lambda store, n=fanout: store.put(DAG_PB, node((), message(5, extra=integer(6, n)))), "shards of")

    def deep(store: Store) -> bytes:
        name = store.put(DAG_PB, node((), data))
        for _ in range(40):
            name = store.put(DAG_PB, node([(name, b"0A", 1)], data))
        return name

    refused(deep, "levels of shards")


def test_links_that_lead_nowhere() -> None:
    for target in (b"", b"a\0b", b"x" * 5000):
        refused(lambda store, t=target: store.put(DAG_PB, node((), integer(1, 4) + text(2, t))), "nowhere")


def test_blocks_larger_than_allowed() -> None:
    with pytest.raises(BlockError, match="allowed"):
        dagpb.decode_node(b"\0" * (dagpb.MAX_BLOCK + 1))
    leaf = binary(RAW, b"\0" * 32)
    with pytest.raises(BlockError, match="links"):
        dagpb.decode_node(node([(leaf, b"", 0)] * (dagpb.MAX_LINKS + 1), b""))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(block: bytes) -> None:
    name = cid.of_block(block, DAG_PB)
    try:
        found = unixfs.decode(name, block)
    except BlockError:
        return
    if isinstance(found, unixfs.File):
        assert 0 <= found.size <= unixfs.MAX_FILE


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_spoiled_block_is_read_or_refused(data: st.DataObject) -> None:
    store = Store()
    leaf = store.file(b"x" * 50)
    block = bytearray(
        data.draw(
            st.sampled_from(
                [
                    store.blocks[store.directory({"a": leaf, "b": leaf}, attributes(0o755, 1))[0]],
                    store.blocks[store.sharded({"a": leaf, "b": leaf, "c": leaf})[0]],
                    store.blocks[store.file(b"y" * 100, chunk=20, extra=attributes(0o644, -1))[0]],
                ]
            )
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(block) - 1))
        block[place] = data.draw(st.integers(0, 255))
    try:
        found = unixfs.decode(cid.of_block(bytes(block), DAG_PB), bytes(block))
        if isinstance(found, unixfs.Directory) and not found.sharded:
            trio.run(unixfs.entries, found, fetcher(store))
    except BlockError:
        return
