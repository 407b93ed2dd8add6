"""What is pinned or meant by a name stays; what nobody needs goes; copies are counted at real peers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostos.cli import main
from hostos.image import child, keeping, seeding
from hostos.image.buildcache import BuildCache
from hostos.image.publish import publish
from hostos.image.store import Store
from hostos.names import push as pushing
from hostos.names.book import Names
from hostos.steps import Steps

pytestmark = pytest.mark.skipif(not shutil.which("tar2sqfs"), reason="needs tar2sqfs (squashfs-tools-ng)")


class Command:
    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(words))
        out, err = self._capsys.readouterr()
        return int(left.value.code or 0), out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_what_is_pinned_or_named_stays(home: Path, tree: Path, run: Command) -> None:
    made = publish(tree, "keep/me", Steps()).hash
    assert run("image", "pin", "keep/me")[0] == 0
    status, _, err = run("image", "rm", "keep/me")
    assert (status, "it is pinned" in err) == (2, True)
    assert run("image", "unpin", "keep/me")[0] == 0
    Names().make_key()
    pushing.push(made, "mine", (), 90)
    status, _, err = run("image", "rm", "keep/me")
    assert (status, "your name mine means it" in err) == (2, True)
    assert Store().find(made)
    status, _, err = run("image", "rm", "keep/me", "--force")
    assert (status, "warning: keep/me: your name mine means it" in err) == (0, True)
    assert Store().find(made) is None


def test_garbage_is_what_nobody_needs(home: Path, tree: Path, run: Command) -> None:
    store = Store()
    kept = store.get(publish(tree, "keep/this", Steps()).hash)
    (tree / "more").write_text("x")
    gone = store.get(child.publish_child(tree, "keep/not", kept, Steps()).hash)
    # As a process leaves it that dies between the two steps of a removal.
    shutil.rmtree(gone.directory)
    old = BuildCache().root / "steps" / "old.json"
    old.write_text("{}")
    os.utime(old, (1, 1))
    new = old.with_name("new.json")
    new.write_text("{}")
    assert {each.what for each in keeping.garbage(store)} == {"layer no image has", "build cache"}
    status, out, _ = run("image", "gc", "--dry-run")
    assert (status, gone.manifest.layers[-1].torrent in out, old.exists()) == (0, True, True)
    assert run("image", "gc")[0] == 0
    assert not old.exists()
    assert new.exists()
    assert [path.name for path in store.layers_dir.iterdir()] == [kept.manifest.layers[0].torrent]
    assert not store.get(kept.hash).missing


def test_the_seed_offers_only_what_it_was_told_to(home: Path, tree: Path, run: Command) -> None:
    one = publish(tree, "only/one", Steps()).hash
    (tree / "more").write_text("x")
    publish(tree, "only/two", Steps())
    assert run("seed", "start", "--only", "only/one")[0] == 0
    running = seeding.status()
    assert running
    offered = {torrent["hash"] for torrent in running.details["torrents"] if torrent["kind"] == "image"}
    assert offered == {one} == set(running.details["only"])
    # Asked again, it is the same; asked for others, it is not.
    assert run("seed", "start", "--only", one[:16])[0] == 0
    assert run("seed", "start", "--only", "only/two")[0] == 2
    status, _, err = run("seed", "start", "--only", "only/three")
    assert (status, "no image 'only/three'" in err) == (2, True)


def test_copies_are_counted_at_peers(home: Path, tree: Path, run: Command) -> None:
    store = Store()
    below = store.get(publish(tree, "copies/a", Steps()).hash)
    (tree / "more").write_text("x")
    made = child.publish_child(tree, "copies/b", below, Steps())
    seed = seeding.start()
    bundle = store.bundle(made.hash)
    # The own seed is nobody else.
    status, out, err = run("image", "copies", "copies/b", "--peer", seed.address)
    assert (status, out.strip()) == (0, "1")
    # One has all of it; nobody is at the other.
    assert keeping.copies(bundle, [seed.address, "127.0.0.1:1"], deadline=2.0) == [seed.address]
    status, out, err = run("image", "copies", "copies/b")
    assert (out.strip(), "the only known copy" in err) == ("1", True)


@pytest.fixture
def other_host(home: Path, tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Where the seed of another host listens, which has the same image as this one, whole: keep/last."""
    with monkeypatch.context() as there:
        there.setenv("HOSTOS_HOME", str(tmp_path / "there"))
        made = publish(tree, "keep/last", Steps()).hash
        address = seeding.start("127.0.0.11").address
    assert publish(tree, "keep/last", Steps()).hash == made
    yield address
    with monkeypatch.context() as there:
        there.setenv("HOSTOS_HOME", str(tmp_path / "there"))
        seeding.stop()


def test_the_last_known_copy_stays(home: Path, tree: Path, run: Command, other_host: str) -> None:
    # Nobody is where somebody is said to be.
    status, _, err = run("image", "rm", "keep/last", "--peer", "127.0.0.1:1")
    assert (status, "it would be the last known copy (127.0.0.1:1 has not all of it)" in err) == (2, True)
    assert Store().get("keep/last")
    # Somebody else has all of it.
    assert run("image", "copies", "keep/last", "--peer", other_host)[1].strip() == "2"
    began = time.monotonic()
    status, _, err = run("image", "rm", "keep/last", "--peer", "127.0.0.1:1", "--peer", other_host)
    assert (status, "last known copy" in err) == (0, False)
    assert time.monotonic() - began < keeping.ANSWER_DEADLINE
    assert Store().images() == []


def test_whom_a_name_names_is_asked(home: Path, tree: Path, run: Command, other_host: str) -> None:
    made = Store().get("keep/last").hash
    Names().make_key()
    pushing.push(made, "mine", ("127.0.0.1:1",), 90)
    status, _, err = run("image", "rm", "keep/last", "--force")
    assert (status, "warning: keep/last: this is the last known copy" in err) == (0, True)
    publish(tree, "keep/last", Steps())
    pushing.push(made, "mine", (other_host,), 90)
    status, _, err = run("image", "rm", "keep/last", "--force")
    assert (status, "last known copy" in err) == (0, False)


def test_a_layer_that_stays_is_not_the_last_copy_of_anything(home: Path, tree: Path, run: Command) -> None:
    store = Store()
    below = store.get(publish(tree, "keep/below", Steps()).hash)
    (tree / "more").write_text("x")
    child.publish_child(tree, "keep/above", below, Steps())
    status, _, err = run("image", "rm", "keep/below", "--peer", "127.0.0.1:1")
    assert (status, err.count("last known copy")) == (0, 0)
    # With nobody to ask it is said, and done.
    status, _, err = run("image", "rm", "keep/above")
    assert (status, "warning: keep/above: this is the last known copy" in err) == (0, True)
    assert store.images() == []


def test_short_spellings(home: Path, tree: Path, run: Command) -> None:
    made = publish(tree, "short/one", Steps()).hash
    assert run("pin", "short/one")[0] == 0
    assert keeping.Pins(Store()).all() == {made}
    assert run("image", "rm", "short/one")[0] == 2
    assert run("unpin", "short/one")[0] == 0
    assert keeping.Pins(Store()).all() == set()
    assert run("seed", "--only", "short/one")[0] == 0
    running = seeding.status()
    assert running
    assert running.details["only"] == [made]
    assert "Commands:" in run("seed", "--help")[1]
