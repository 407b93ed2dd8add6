"""Read-ahead, figures of waits, proof and keeping of pieces, and the parser of /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hostos.live.pieces import PieceHashes, PieceStore
from hostos.live.processes import Process, children, is_first, parent
from hostos.live.source import ReadAhead, SourceError, Waits
from hostos.live.torrents import make_layer_torrent

PIECE = 16384


def test_scattered_reads_prefetch_nothing() -> None:
    ahead = ReadAhead()
    assert [ahead.pieces(piece, piece) for piece in (5, 90, 3, 4, 77, 1)] == [0] * 6


def test_sequential_reads_prefetch_up_to_the_limit() -> None:
    ahead = ReadAhead(limit=4)
    assert [ahead.pieces(piece, piece) for piece in range(7)] == [0, 0, 1, 2, 4, 4, 4]
    assert ahead.pieces(100, 100) == 0


@pytest.mark.parametrize(("wait", "limit"), [(0.0, 2), (0.04, 8), (0.2, 40), (5.0, 64)])
def test_the_longer_a_round_trip_the_further_ahead(wait: float, limit: int) -> None:
    ahead = ReadAhead()
    ahead.adapt(wait)
    assert [ahead.pieces(piece, piece) for piece in range(9)][-1] == limit


def test_a_long_row_is_a_pattern_whatever_the_round_trip() -> None:
    ahead = ReadAhead()
    found = [ahead.pieces(piece, piece) for piece in range(400)]
    assert found[:10] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2]
    assert found[-1] == ReadAhead.MOST
    assert ahead.pieces(1000, 1000) == 0


def test_the_shortest_wait_counts() -> None:
    ahead = ReadAhead()
    for wait in (0.3, 0.04, 2.0):
        ahead.adapt(wait)
    assert ahead.limit == 8


def test_several_reads_of_one_piece_are_not_a_sequence() -> None:
    ahead = ReadAhead()
    assert [ahead.pieces(7, 7) for _ in range(10)] == [0] * 10


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 8))), st.integers(0, 16))
def test_prefetch_is_bounded(reads: list[tuple[int, int]], limit: int) -> None:
    ahead = ReadAhead(limit)
    assert all(0 <= ahead.pieces(first, first + more) <= max(limit, len(reads) // 4) for first, more in reads)
    assert limit or not any(ahead.pieces(first, first) for first in range(9))


@given(st.lists(st.floats(0, 100), min_size=1))
def test_quantiles_are_durations_that_were_seen(durations: list[float]) -> None:
    waits = Waits()
    for duration in durations:
        waits.add(duration)
    assert waits.quantile(0.5) in durations
    assert waits.quantile(0.5) <= waits.quantile(0.95) <= waits.longest == max(durations)


def test_no_waits() -> None:
    assert Waits().quantile(0.95) == 0.0


def test_source_error_is_an_input_output_error() -> None:
    error = SourceError("nobody there")
    assert (error.errno, error.strerror) == (5, "nobody there")


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5 * PIECE), st.integers(0, 255))
@example(4 * PIECE + 1, 0)
def test_pieces_are_proved_and_any_change_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int
) -> None:
    path: Path = tmp_path_factory.mktemp("layer") / "x"
    content = bytes((seed + number * number) % 251 for number in range(size))
    path.write_bytes(content)
    hashes = PieceHashes(make_layer_torrent(path, piece_size=PIECE).data)
    for piece in range(-(-size // PIECE)):
        data = content[piece * PIECE : (piece + 1) * PIECE]
        assert hashes.proves(piece, data)
        changed = bytearray(data)
        changed[seed % len(changed)] ^= 1
        assert not hashes.proves(piece, bytes(changed))
        assert not hashes.proves(piece, data[:-1])
        assert not hashes.proves(piece + 1, data) or content[(piece + 1) * PIECE :][:PIECE] == data
    assert not hashes.proves(10_000, content[:PIECE])


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(0, 1 << 22))
def test_parent_whatever_the_program_is_called(name: str, number: int) -> None:
    assert parent(f"17 ({name}) S {number} 17 17 0 -1 4194560") == number


def test_own_processes() -> None:
    with open(f"/proc/{os.getpid()}/stat") as file:  # noqa: PTH123
        assert parent(file.read()) == os.getppid()
    assert os.getpid() in children(os.getppid())
    assert not is_first(os.getpid())
    own = Process(os.getpid())
    assert own.alive
    own.close()


def test_process_that_is_gone() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    watched = Process(child)
    os.waitpid(child, 0)
    assert not watched.alive
    watched.send(9)
    watched.close()
    with pytest.raises(ProcessLookupError):
        Process(child)


class Layer:
    """A layer of four pieces, the last one short, and a store beside it that counts what was lost."""

    def __init__(self, directory: Path, **options: bool) -> None:
        self.content = bytes(number * number % 251 for number in range(3 * PIECE + 1000))
        self.path = directory / "layer"
        self.path.write_bytes(self.content)
        self.hashes = PieceHashes(make_layer_torrent(self.path, piece_size=PIECE).data)
        self.lost = 0
        self.store = self.open(**options)

    def open(self, **options: bool) -> PieceStore:
        store = PieceStore(self.path, len(self.content), PIECE, 4, hashes=self.hashes, lost=self._count, **options)
        store.open()
        return store

    def _count(self) -> None:
        self.lost += 1

    def piece(self, number: int) -> bytes:
        return self.content[number * PIECE : (number + 1) * PIECE]

    def arrive(self, number: int) -> None:
        self.store.finished(number)
        assert self.store.delivered(number, self.piece(number))

    def flush(self) -> list[int]:
        self.store.begin_flush()
        return self.store.confirm_flush()

    def read(self, store: PieceStore, number: int) -> bytes | None:
        return store.get(number, number * PIECE, min((number + 1) * PIECE, len(self.content)))


def test_a_piece_is_read_from_memory_until_it_is_in_the_file(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    store = layer.store
    assert not store.ready(1)
    assert layer.read(store, 1) is None
    layer.path.unlink()
    layer.arrive(1)
    assert layer.read(store, 1) == layer.piece(1)
    assert store.get(1, PIECE + 5, PIECE + 9) == layer.content[PIECE + 5 : PIECE + 9]
    assert store.on_disk() == [False] * 4
    layer.path.write_bytes(layer.content)
    assert store.unflushed
    assert layer.flush() == [1]
    assert not store.unflushed
    assert store.on_disk() == [False, True, False, False]
    assert layer.read(store, 1) == layer.piece(1)
    store.close()
    assert layer.read(store, 1) is None
    assert not layer.lost


def test_padding_of_the_last_piece_is_cut(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    layer.store.finished(3)
    assert layer.store.verified_bytes() == 1000
    assert layer.store.delivered(3, layer.piece(3) + bytes(PIECE - 1000))
    assert layer.read(layer.store, 3) == layer.piece(3)


def test_zeros_read_back_are_no_piece(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    layer.store.finished(2)
    assert not layer.store.delivered(2, bytes(PIECE))
    assert layer.lost == 1
    assert not layer.store.ready(2)
    assert not layer.store.verified(2)


@pytest.mark.parametrize("damage", ["another byte", "too short", "gone"])
def test_a_confirmed_flush_is_not_believed(tmp_path: Path, damage: str) -> None:
    layer = Layer(tmp_path)
    layer.arrive(2)
    if damage == "another byte":
        layer.path.write_bytes(layer.content[: 2 * PIECE] + b"?" + layer.content[2 * PIECE + 1 :])
    elif damage == "too short":
        os.truncate(layer.path, 2 * PIECE + 7)
    else:
        layer.path.unlink()
    assert layer.flush() == [2]
    assert layer.lost == 1
    assert layer.read(layer.store, 2) is None
    layer.store.close()


def test_a_flush_confirms_only_what_came_before_it(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    layer.arrive(0)
    layer.store.begin_flush()
    layer.arrive(1)
    assert layer.store.confirm_flush() == [0]
    assert layer.store.on_disk() == [True, False, False, False]
    layer.store.forget_unwritten()
    assert [layer.store.verified(piece) for piece in range(2)] == [True, False]
    assert layer.read(layer.store, 1) == layer.piece(1)  # it is still held
    layer.store.close()


def test_what_an_earlier_run_noted_is_proved_when_it_is_read(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    for piece in range(3):
        layer.arrive(piece)
    layer.flush()
    layer.store.close()
    layer.path.write_bytes(b"?" + layer.content[1:])
    again = layer.open()
    assert [again.expected(piece) for piece in range(4)] == [True, True, True, False]
    assert not any(again.ready(piece) for piece in range(4))
    assert [again.prove(piece) for piece in range(4)] == [False, True, True, False]
    assert again.next_claim() is None
    assert again.on_disk() == [False, True, True, False]
    assert layer.read(again, 2) == layer.piece(2)
    assert not layer.lost  # libtorrent never believed to have piece 0
    os.truncate(layer.path, 2 * PIECE)
    with pytest.raises(SourceError, match="shorter"):
        layer.read(again, 2)
    assert not again.ready(2)
    again.close()


def test_what_libtorrent_wrote_itself_is_no_news_to_it(tmp_path: Path) -> None:
    layer = Layer(tmp_path)
    for piece in range(2):
        layer.store.finished(piece)
    layer.flush()
    assert layer.store.next_claim() is None
    assert not layer.store.prove(0)
    assert layer.store.on_disk() == [True, False, False, False]
    layer.store.forget_unwritten()
    # It is told to have piece 0 only, from now on.
    assert layer.store.next_claim() == 1
    assert layer.store.prove(1)
    layer.store.close()


def test_a_note_of_another_length_claims_nothing(tmp_path: Path) -> None:
    (tmp_path / "pieces").write_bytes(b"\1" * 5)
    layer = Layer(tmp_path)
    assert not any(layer.store.expected(piece) for piece in range(4))


def test_a_store_that_keeps_everything_never_reads_the_file(tmp_path: Path) -> None:
    layer = Layer(tmp_path, keep=True)
    layer.path.unlink()
    layer.arrive(1)
    assert layer.flush() == []
    assert layer.read(layer.store, 1) == layer.piece(1)
    assert not (tmp_path / "pieces").exists()
