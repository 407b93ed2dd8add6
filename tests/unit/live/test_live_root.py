"""What the kernel command line asks for, and what an image is given to become a machine's system."""

import os
from pathlib import Path

import pytest

from hostos.errors import UserError
from hostos.live import root_files
from hostos.live.inside import Inside
from hostos.live.root import DEADLINE, parse, running_programs

HASH = "ab" * 32


def test_the_command_line_names_image_peers_and_how():
    found = parse(f"quiet hostos.root={HASH} hostos.peer=10.0.2.2:6881 hostos.persist=1 hostos.deadline=7\n")
    assert (found.image, found.peers, found.persist, found.deadline) == (HASH, ("10.0.2.2:6881",), True, 7.0)
    assert not found.rest.fetch


def test_its_reads_can_be_noted():
    assert parse(f"hostos.root={HASH} hostos.trace=1").trace
    assert not parse(f"hostos.root={HASH} hostos.trace=0").trace
    assert not parse(f"hostos.root={HASH}").trace


def test_what_the_launcher_brought_is_added():
    found = parse(f"hostos.root={HASH} hostos.peer=192.0.2.1:1", ["hostos.peer=10.0.2.2:2", "hostos.peer=192.0.2.1:1"])
    assert found.peers == ("192.0.2.1:1", "10.0.2.2:2")
    assert (found.persist, found.deadline) == (False, DEADLINE)


def test_what_follows_two_dashes_is_for_the_init():
    assert parse(f"hostos.root={HASH} -- hostos.persist=1").persist is False


@pytest.mark.parametrize(
    "line",
    [
        "quiet",
        "hostos.root=xyz",
        "hostos.root=" + "0" * 40,
        f"hostos.root={HASH} hostos.peer=nowhere",
        f"hostos.root={HASH} hostos.deadline=soon",
        f"hostos.root={HASH} hostos.complete=maybe",
    ],
)
def test_what_makes_no_sense_is_refused(line):
    with pytest.raises(UserError):
        parse(line)


@pytest.fixture
def image(tmp_path):
    """A root like Debian's, with absolute links, which must not lead out of it."""
    root = tmp_path / "image"
    for name in ("usr/sbin", "usr/lib/systemd", "etc/ssh", "root", "run", "tmp"):
        (root / name).mkdir(parents=True)
    (root / "sbin").symlink_to("/usr/sbin")
    (root / "usr/lib/systemd/systemd").write_text("init")
    (root / "usr/lib/systemd/systemd").chmod(0o755)
    (root / "usr/sbin/init").symlink_to("/usr/lib/systemd/systemd")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n127.0.1.1 builder\n")
    (root / "etc/ssh/ssh_host_rsa_key").write_text("known to all")
    (root / "etc/resolv.conf").symlink_to("/run/builder/resolv.conf")
    return root


@pytest.fixture
def here(tmp_path):
    """The initial file system of the machine."""
    place = tmp_path / "here"
    (place / "etc/hostos/instance").mkdir(parents=True)
    (place / "root/.ssh").mkdir(parents=True)
    (place / "etc/hostname").write_text("web\n")
    (place / "etc/hostos/instance/ssh_host_ed25519_key").write_text("private")
    (place / "etc/hostos/instance/ssh_host_ed25519_key.pub").write_text("ssh-ed25519 AAAA host\n")
    (place / "root/.ssh/authorized_keys").write_text("ssh-ed25519 AAAA control\n")
    return place


def test_links_are_followed_as_the_image_would(image):
    outside = image.parent / "outside"
    outside.mkdir()
    (image / "srv").symlink_to(outside)
    (image / "up").symlink_to("../../..")
    with Inside(image) as root:
        assert root.program("etc/init", "sbin/init") == "sbin/init"
        assert root.program("etc/hosts", "usr/lib/systemd") == ""
        assert root.target("etc/resolv.conf") == "/run/builder/resolv.conf"
        assert root.target("etc/hosts") == ""
        root.write("up/etc/found", "here")
        with pytest.raises(FileExistsError):  # a link to nowhere, in there
            root.write("srv/x", "")
    assert (image / "etc/found").read_text() == "here"
    assert list(outside.iterdir()) == []


def test_an_image_gets_a_name_keys_and_an_identity(image, here):
    with Inside(image) as root:
        root_files.identify(root, here)
    assert (image / "etc/hostname").read_text() == "web\n"
    assert (image / "etc/hosts").read_text() == "127.0.0.1 localhost\n127.0.1.1 web\n"
    key = image / "etc/ssh/ssh_host_ed25519_key"
    assert (key.read_text(), key.stat().st_mode & 0o777) == ("private", 0o600)
    assert not (image / "etc/ssh/ssh_host_rsa_key").exists()
    authorized = image / "root/.ssh/authorized_keys"
    assert authorized.read_text() == "ssh-ed25519 AAAA control\n"
    assert (authorized.stat().st_mode & 0o777, authorized.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    machine = (image / "etc/machine-id").read_text()
    assert len(machine) == 33
    assert int(machine, 16)


def test_a_second_start_over_kept_changes_adds_nothing_twice(image, here):
    with Inside(image) as root:
        root_files.identify(root, here, kept=True)
        before = {path: path.read_bytes() for path in image.rglob("*") if path.is_file()}
        root_files.identify(root, here, kept=True)
    assert {path: path.read_bytes() for path in image.rglob("*") if path.is_file()} == before
    assert (image / "etc/ssh/ssh_host_rsa_key").exists()


def test_systemd_need_not_look_after_what_came_with_usr(image):
    stamp = 1_600_000_000_123_456_789
    (image / "etc/.updated").write_text("of the base\n")
    os.utime(image / "etc/.updated", ns=(stamp - 1, stamp - 1))
    os.utime(image / "usr", ns=(stamp, stamp))
    with Inside(image) as root:
        root_files.up_to_date(root)
        # /etc may be empty on purpose: systemd is to fill it.
        assert not (image / "var/.updated").exists()
        (image / "etc/ld.so.cache").write_text("libraries")
        root_files.up_to_date(root)
        for directory in ("etc", "var"):
            # ConditionNeedsUpdate= compares just these times.
            assert (image / directory / ".updated").stat().st_mtime_ns == stamp
            assert (image / directory / ".updated").read_text() == f"TIMESTAMP_NSEC={stamp}\n"
        (image / "etc/.updated").write_text("newer\n")
        root_files.up_to_date(root)
    assert (image / "etc/.updated").read_text() == "newer\n"


def test_an_image_without_usr_is_left_alone(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.cache").write_text("libraries")
    with Inside(tmp_path) as root:
        root_files.up_to_date(root)
    assert not (tmp_path / "etc/.updated").exists()


def test_every_manager_of_networks_is_told(image):
    with Inside(image) as root:
        root_files.keep_network(root, "eth0", ["10.0.2.3"])
    text = (image / "run/systemd/network/00-hostos.network").read_text()
    assert "Name=eth0" in text
    assert "KeepConfiguration=yes" in text
    assert "managed=0" in (image / "run/NetworkManager/conf.d/00-hostos.conf").read_text()
    assert (image / "run/network/ifstate").read_text() == "eth0=eth0\n"
    assert (image / "run/network/ifstate.eth0").read_text() == "eth0\n"
    assert str((image / "etc/resolv.conf").readlink()) == "/run/hostos/resolv.conf"


def test_a_resolver_of_the_image_keeps_its_own_file(image):
    (image / "etc/resolv.conf").unlink()
    (image / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    with Inside(image) as root:
        root_files.keep_network(root, "eth0", ["10.0.2.3"])
    assert "stub" in str((image / "etc/resolv.conf").readlink())


def test_running_programs_are_init_s_first(tmp_path):
    """Lines as in proc_pid_maps(5); a name may have spaces, and what has none is no file."""
    for pid, lines in {
        "7": ["7f0-7f1 r-xp 00000000 00:1c 5 /usr/sbin/ssh server", "7f2-7f3 rw-p 00000000 00:00 0"],
        "1": [
            "55d-55e r--p 00000000 00:1c 2 /usr/share/data",
            "55e-55f r-xp 00001000 00:1c 3 /usr/lib/systemd/systemd",
            "7ff-800 r-xp 00000000 00:00 0 [vdso]",
        ],
        "self": ["7f0-7f1 r-xp 00000000 00:1c 9 /usr/bin/me"],
    }.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "maps").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "9").mkdir()
    assert running_programs(tmp_path) == ["usr/lib/systemd/systemd", "usr/sbin/ssh server"]


def test_fetching_reads_as_much_as_asked(image):
    def read_so_far():
        return int(Path("/proc/self/io").read_text().split()[1])

    (image / "usr/lib/big").write_bytes(bytes(3 << 20))
    with Inside(image) as root:
        for most, least in ((5 << 20, 3 << 20), (2 << 20, 2 << 20)):
            before = read_so_far()
            root.fetch("usr/lib/big", most)
            assert least <= read_so_far() - before < least + (1 << 19)
        with pytest.raises(FileNotFoundError):
            root.fetch("usr/lib/none", 1)


def test_without_udev_the_console_waits_for_no_device(image):
    units = image / "run/systemd/system"
    udev = image / "usr/lib/systemd/systemd-udevd"
    udev.touch(0o755)
    with Inside(image) as root:
        root_files.give_console(root, "tty0 ttyS0\n")
        assert not units.exists()
        udev.unlink()
        root_files.give_console(root, "tty0 ttyS0\n")
    assert str((units / "serial-getty@ttyS0.service").readlink()) == "/dev/null"
    assert not (units / "serial-getty@tty0.service").is_symlink()
    assert "console-getty" in str((units / "getty.target.wants/console-getty.service").readlink())
