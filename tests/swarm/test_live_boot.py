"""Live boot from a bare hash: a real swarm, FUSE, squashfs, overlay and nspawn."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostos.errors import UserError
from swarm.conftest import Daemon, Published, Start, publish, run, wait_until

SEED = "127.0.0.2:7101"


def describe(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything a file system says about every file below `root`."""
    found: dict[str, tuple[object, ...]] = {}
    inodes: dict[int, str] = {}
    for parent, directories, files in os.walk(root):
        for name in sorted((*directories, *files)):
            path = Path(parent) / name
            status = path.lstat()
            relative = str(path.relative_to(root))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = str(path.readlink())
            first = inodes.setdefault(status.st_ino, relative) if status.st_nlink > 1 and not path.is_dir() else ""
            attributes = {key: os.getxattr(path, key, follow_symlinks=False) for key in user_attributes(path)}
            facts = (status.st_mode, status.st_uid, status.st_gid, int(status.st_mtime), status.st_rdev)
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            found[relative] = (*facts, size, content, first, tuple(attributes.items()))
    return found


def user_attributes(path: Path) -> list[str]:
    return [key for key in os.listxattr(path, follow_symlinks=False) if key.startswith("user.")]


def test_whole_tree_equals_its_source(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        mounted = client.ask("mount", image=published.image, peers=[SEED], name="tree")
        there, source = describe(Path(mounted["root"])), describe(published.tree)
        assert there == source
        assert len(source) > 60
        figures = client.ask("unmount", name="tree")
    assert figures["layers"][0]["hash_failures"] == 0
    assert [point for point in daemon.mounts() if not point.endswith("/fuse")] == []


def test_command_with_its_streams_and_exit_code(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        done = run(client, published.image, SEED, "sh", "-c", "cat; echo to stderr >&2; exit 7", stdin=b"in\0put\n")
        assert (done.status, done.stdout) == (7, b"in\0put\n")
        # Where /run is not a tmpfs, nspawn itself adds a complaint about that.
        assert done.stderr.startswith(b"to stderr\n")
        assert done.figures["state"] == "ended"
        # Reading a shell and cat must not fetch 24 MB of data nobody reads.
        fetched, size = done.figures["fetched"], done.figures["size"]
        assert isinstance(fetched, int)
        assert isinstance(size, int)
        assert 0 < fetched < 0.3 * size
        # What has been fetched is not fetched again.
        again = run(client, published.image, SEED, "sh", "-c", "exit 0")
        assert (again.status, again.figures["fetched"]) == (0, 0)


def test_users_are_private_and_nothing_is_copied_up(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    script = "cat /proc/self/uid_map; stat -c '%u %g %a' /home/user/note /root /tmp; echo x > /root/new; ls -n /root"
    with daemon.client() as client:
        answer = client.ask("prepare", image=published.image, peers=[SEED], command=["sh", "-c", script], hold=True)
        done = subprocess.run(answer["argv"], capture_output=True, text=True, timeout=60, check=True)
        lines = done.stdout.splitlines()
        inside, outside, count = map(int, lines[0].split())
        assert (inside, count) == (0, 65536)
        assert outside >= 524288
        assert lines[1:4] == ["1000 1000 644", "0 0 755", "0 0 1777"]
        assert lines[-1].split()[2:4] == ["0", "0"]
        client.ask("release", name=answer["name"])


def test_read_only_and_no_network_by_default(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        script = "echo x 2>/dev/null >/root/new && echo wrote; ls /sys/class/net; cat /proc/net/route"
        done = run(client, published.image, SEED, "sh", "-c", script, read_only=True)
        assert done.stdout.split()[0] == b"lo"
        assert b"wrote" not in done.stdout
        shared = run(client, published.image, SEED, "cat", "/proc/net/dev", network="host")
        assert shared.stdout.splitlines()[2:] != []
        assert b"eth" in shared.stdout or len(shared.stdout.splitlines()) >= 3


def test_directory_of_the_machine_bound_in(daemon: Daemon, seed: Start, published: Published, tmp_path: Path) -> None:
    seed(SEED)
    shared = tmp_path / "with: colon"
    shared.mkdir()
    (shared / "hello").write_text("from outside\n")
    with daemon.client() as client:
        binds = [str(shared).replace(":", "\\:") + ":/mnt/in", f"{published.tree}/etc:/mnt/etc:ro"]
        script = "cat /mnt/in/hello; echo back > /mnt/in/answer; echo x > /mnt/etc/x || echo refused"
        done = run(client, published.image, SEED, "sh", "-c", script, binds=binds)
    assert done.stdout == b"from outside\nrefused\n", done
    assert (shared / "answer").read_text() == "back\n"
    assert (shared / "answer").stat().st_uid == 0


def test_bind_from_a_file_system_that_cannot_shift_owners(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        ask = {"image": published.image, "peers": [SEED], "binds": ["/proc/sys/kernel:/mnt/kernel:ro"], "hold": True}
        answer = client.ask("prepare", command=["cat", "/mnt/kernel/ostype"], **ask)
        assert answer["warnings"] == [
            "/proc/sys/kernel belongs to nobody in the container: its file system can't shift owners"
        ]
        done = subprocess.run(answer["argv"], capture_output=True, timeout=60, check=True)
        assert done.stdout == b"Linux\n"
        client.ask("release", name=answer["name"])


def test_random_reads_by_many_threads(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    content = published.layer.read_bytes()

    def read(number: int) -> int:
        choice = random.Random(number)
        wrong = 0
        with daemon.fuse_file(published).open("rb", buffering=0) as file:
            for _ in range(60):
                start, length = choice.randrange(len(content)), choice.choice((1, 512, 4096, 70_000, 200_000))
                data = os.pread(file.fileno(), length, start)
                wrong += data != content[start : start + length]
        return wrong

    with daemon.client() as client:
        client.ask("mount", image=published.image, peers=[SEED], name="reads")
        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(read, range(16))) == 0
        client.ask("unmount", name="reads")


def test_two_containers_share_a_layer_and_a_taken_name_is_refused(
    daemon: Daemon, seed: Start, published: Published
) -> None:
    seed(SEED)
    with daemon.client() as client:
        ask = {"image": published.image, "peers": [SEED], "hold": True}
        first = client.ask("prepare", name="one", command=["sleep", "60"], **ask)
        second = client.ask("prepare", name="two", command=["sh", "-c", "sleep 1; cat /var/data7"], **ask)
        running = subprocess.Popen(first["argv"])
        reading = subprocess.Popen(second["argv"], stdout=subprocess.PIPE)
        assert daemon.loops() == 1
        with pytest.raises(Exception, match="called 'one' already"):
            client.ask("prepare", name="one", command=["true"], **ask)
        wait_until(lambda: client.ask("stats", name="one")["state"] == "running", 20)
        listed = client.ask("list")["containers"]
        assert sorted(item["name"] for item in listed) == ["one", "two"]
        assert len({item["users"] for item in listed}) == 2
        stopped = client.ask("stop", name="one", deadline=15)
        assert stopped["gently"] is True
        running.wait(5)
        output, _ = reading.communicate(timeout=30)
        assert output == (published.tree / "var/data7").read_bytes()
        client.ask("release", name="two")


def test_init_in_the_background(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    with daemon.client() as client:
        ask = {"image": published.image, "peers": [SEED], "init": True, "console": "read-only"}
        name = client.ask("prepare", **ask)["name"]
        assert name == "swarm-test"
        client.ask("start", name=name, ready_within=20)
        for command, expected in ((["cat", "/etc/os-release"], b"ID=swarm\n"), (["id", "-u"], b"0\n")):
            argv = client.ask("exec", name=name, command=command)["argv"]
            assert subprocess.run(argv, capture_output=True, timeout=20, check=True).stdout.startswith(expected)
        shell = client.ask("exec", name=name, command=[])["argv"]
        done = subprocess.run(shell, input=b"echo $0; exit 3\n", capture_output=True, timeout=20, check=False)
        assert done.returncode == 3
        argv = client.ask("logs", name=name)["argv"]
        wait_until(lambda: b"init has come up as 0" in subprocess.check_output(argv, timeout=20), 20)
        assert client.ask("stop", name=name, deadline=20)["gently"] is True
        assert client.ask("list")["containers"] == []


def test_container_ends_with_the_client_that_held_it(daemon: Daemon, seed: Start, published: Published) -> None:
    seed(SEED)
    client = daemon.client()
    answer = client.ask("prepare", image=published.image, peers=[SEED], command=["sleep", "600"], hold=True)
    running = subprocess.Popen(answer["argv"])
    wait_until(lambda: client.ask("stats", name=answer["name"])["state"] == "running", 20)
    client.close()
    running.wait(20)
    with daemon.client() as other:
        wait_until(lambda: not other.ask("list")["containers"], 10)
    # Prepared and never run: gone with its client, too.
    client = daemon.client()
    client.ask("prepare", image=published.image, peers=[SEED], command=["sleep", "600"], hold=True)
    client.close()
    with daemon.client() as other:
        wait_until(lambda: not other.ask("list")["containers"], 10)


def test_stopping_the_daemon_ends_containers_and_undoes_mounts(
    daemon: Daemon, seed: Start, published: Published
) -> None:
    seed(SEED)
    with daemon.client() as client:
        answer = client.ask("prepare", image=published.image, peers=[SEED], command=["sleep", "600"])
        running = subprocess.Popen(answer["argv"])
        wait_until(lambda: client.ask("stats", name=answer["name"])["state"] == "running", 20)
    daemon.stop()
    running.wait(10)
    assert daemon.process.returncode == 0
    assert daemon.mounts() == []
    assert daemon.loops() == 0


def test_daemon_killed_and_started_over_the_same_cache(daemon: Daemon, seed: Start, published: Published) -> None:
    serving = seed(SEED)
    with daemon.client() as client:
        answer = client.ask("prepare", image=published.image, peers=[SEED], command=["sleep", "600"])
        running = subprocess.Popen(answer["argv"])
        wait_until(lambda: client.ask("stats", name=answer["name"])["state"] == "running", 20)
        with daemon.fuse_file(published).open("rb") as file:
            assert file.read() == published.layer.read_bytes()
        # Until it is confirmed on disk it may be fetched again.
        wait_until(
            lambda: client.ask("stats", name=answer["name"])["layers"][0]["verified"] >= published.layer_torrent.size, 5
        )
    time.sleep(1.2)
    daemon.stop(signal.SIGKILL)
    (daemon.base / "sock").unlink()
    daemon.start()
    # Its root cannot be read any more; it must not linger.
    running.wait(10)
    serving.stop(signal.SIGKILL)
    with daemon.client() as client:
        assert client.ask("list")["containers"] == []
        client.ask("mount", image=published.image, peers=[SEED], name="again", deadline=5)
        assert daemon.fuse_file(published).read_bytes() == published.layer.read_bytes()
        assert client.ask("unmount", name="again")["fetched"] == 0


def test_layers_on_top_of_each_other(daemon: Daemon, seed: Start, published: Published, tmp_path: Path) -> None:
    from hostos.live.manifest import Layer, Manifest
    from hostos.live.torrents import make_image_torrent

    top = tmp_path / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/os-release").write_text("ID=child\n")
    (top / "var").mkdir()
    os.mknod(top / "var/data3", 0o020000, os.makedev(0, 0))  # a whiteout: data3 is gone
    child = publish(top, tmp_path / "child", "child")
    lower, upper = published.layer_torrent, child.layer_torrent
    layers = tuple(Layer(torrent.info_hash, torrent.size, torrent.name) for torrent in (lower, upper))
    image, files = make_image_torrent(Manifest("both", os.uname().machine, layers), [lower.data, upper.data])
    for path, data in files.items():
        target = child.directory / image.info_hash / image.name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    (child.directory / f"{image.info_hash}.torrent").write_bytes(image.data)
    seed(SEED)
    other = "127.0.0.4:7104"
    seed(other, child)
    with daemon.client() as client:
        script = "cat /etc/os-release; ls /var"
        answer = client.ask(
            "prepare", image=image.info_hash, peers=[SEED, other], command=["sh", "-c", script], hold=True
        )
        done = subprocess.run(answer["argv"], capture_output=True, timeout=60, check=True)
        client.ask("release", name=answer["name"])
    names = done.stdout.split()
    assert names[0] == b"ID=child"
    assert b"data2" in names
    assert b"data3" not in names


@pytest.mark.parametrize("daemon", [("--keep", "/tmp/hostos-swarm-kept")], indirect=True)
def test_changes_are_kept_under_a_name(daemon: Daemon, seed: Start, published: Published, tmp_path: Path) -> None:
    seed(SEED)
    kept = Path("/tmp/hostos-swarm-kept")
    try:
        with daemon.client() as client:
            script = "cat /root/note; rm /home/user/note; echo kept >> /root/note; chmod 600 /root/note; ls /home/user"
            first = run(client, published.image, SEED, "sh", "-c", script, persist="web")
            assert b"note" not in first.stdout.split()
            # Another container in between takes the first range of users.
            assert run(client, published.image, SEED, "sh", "-c", "cat /root/note").stdout == b""
            script = "id -u; stat -c '%u %a' /root/note; " + script
            again = run(client, published.image, SEED, "sh", "-c", script, persist="web")
            assert again.stdout.splitlines()[:3] == [b"0", b"0 600", b"kept"]
        daemon.stop()
        daemon.start()
        with daemon.client() as client:
            later = run(client, published.image, SEED, "cat", "/root/note", persist="web")
            assert later.stdout == b"kept\nkept\n"
            answer = client.ask(
                "prepare", image=published.image, peers=[SEED], command=["sh"], persist="web", hold=True
            )
            with pytest.raises(UserError, match="writes to what is kept"):
                client.ask("prepare", image=published.image, peers=[SEED], command=["sh"], persist="web")
            client.ask("release", name=answer["name"])
            with pytest.raises(UserError, match="limits need systemd"):
                client.ask("prepare", image=published.image, peers=[SEED], command=["sh"], memory="64m")
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def test_a_network_of_its_own(daemon: Daemon, seed: Start, published: Published) -> None:
    """Two at once, each with its own; neither can change it, and nothing is left."""
    seed(SEED)
    links = Path("/sys/class/net")
    script = "cat /proc/net/dev /proc/net/fib_trie"
    with daemon.client() as client:
        answer = client.ask(
            "prepare", image=published.image, peers=[SEED], command=["sh"], network="nat", name="first", hold=True
        )
        assert (links / "hc0").exists()
        done = run(client, published.image, SEED, "sh", "-c", script, network="nat", name="second")
        assert done.status == 0, done
        assert b"host0" in done.stdout
        assert b"10.88.0.6" in done.stdout  # the second network of four addresses
        assert b"eth0" not in done.stdout
        assert not (links / "hc1").exists()
        client.ask("release", name=answer["name"])
        assert not (links / "hc0").exists()
