"""Lease files of every server, with their quirks, damaged, and while they change."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostos.errors import UserError
from hostos.machine import leases
from hostos.machine.leases import FORMATS, Lease, LeaseFile, default_sources, detect, find, named_source
from hostos.machine.leases.model import mac_of_client_id, parse_mac

FILES = Path(__file__).parent / "leases"
# Monday, 24 November 2025, 16:00 UTC.
WHEN = 1764000000.0
MAC = "52:54:00:12:34:56"


def read(name: str) -> str:
    return (FILES / name).read_text()


def test_dnsmasq() -> None:
    """Expired duplicates stay; the IPv6 part and a line that is being written are not taken."""
    assert leases.dnsmasq.parse(read("dnsmasq.leases")) == [
        Lease("192.168.77.23", MAC, "box", WHEN),
        Lease("192.168.77.24", "52:54:00:ab:cd:ef", "", WHEN + 3600),
        Lease("192.168.77.2", "52:54:00:00:00:01", "printer", None),
        Lease("192.168.77.30", "00:0c:29:01:02:03", "radio", WHEN),
        Lease("192.168.77.99", MAC, "box", WHEN - 1000),
    ]


def test_libvirt() -> None:
    assert leases.libvirt.parse(read("libvirt.status")) == [
        Lease("192.168.122.23", MAC, "box", WHEN),
        Lease("192.168.122.99", MAC, "", WHEN - 10000),
    ]
    # Before the first lease.
    assert leases.libvirt.parse("") == leases.libvirt.parse("[]\n") == []


def test_networkd() -> None:
    """With hardware address, as systemd 256 wrote it without, and with a DUID that tells no MAC."""
    assert leases.networkd.parse(read("networkd.json")) == [
        Lease("192.168.77.23", MAC, "box", WHEN),
        Lease("192.168.77.24", "52:54:00:ab:cd:ef", "", WHEN + 3600),
        Lease("192.168.77.25", None, "duid", None),
    ]


def test_macos() -> None:
    """Octets without leading zeros (and `f0` keeps its own), newest first, DUIDs with and without MAC."""
    assert leases.macos.parse(read("macos.leases")) == [
        Lease("192.168.64.7", "52:54:00:02:d8:f0", "box", 1764003712.0),
        Lease("192.168.64.3", None, "ubuntu", 1764003712.0),
        Lease("192.168.64.5", MAC, "alpine", 1764003712.0),
        Lease("192.168.64.2", "52:54:00:02:d8:f0", "box", 1764001440.0),
        Lease("192.168.64.9", "02:42:00:f0:0a:10", "", 1764003712.0),
    ]


def test_isc() -> None:
    """A log: the last entry of an address holds, also if it says free; other blocks and strings with
    braces in between; the entry that is being written is not taken."""
    assert leases.isc.parse(read("isc.leases")) == [
        Lease("192.168.77.24", "52:54:00:ab:cd:ef", "duid-llt", None),
        Lease("192.168.77.23", MAC, "box", WHEN),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dnsmasq.leases", "dnsmasq"),
        ("libvirt.status", "libvirt"),
        ("networkd.json", "networkd"),
        ("macos.leases", "macos"),
        ("isc.leases", "isc"),
    ],
)
def test_the_format_is_found_out(name: str, kind: str) -> None:
    assert detect(read(name)) is FORMATS[kind]
    assert LeaseFile(FILES / name).leases() == FORMATS[kind](read(name))


def source(tmp_path: Path, *lines: str, name: str = "leases") -> LeaseFile:
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return LeaseFile(path, "dnsmasq")


def test_mac_before_name_newest_before_older_expired_never(tmp_path: Path) -> None:
    file = source(
        tmp_path,
        "1000 52:54:00:00:00:01 10.0.0.1 box *",
        "3000 52:54:00:00:00:01 10.0.0.3 box *",
        "2000 52:54:00:00:00:01 10.0.0.2 box *",
        # Another machine may call itself the same.
        "9000 52:54:00:00:00:02 10.0.0.9 box *",
        "9000 06-00:00 10.0.0.8 box.lan *",
    )

    def address(mac: str, hostname: str, now: float) -> str | None:
        found = find([file], mac, hostname, now)
        return found.lease.address if found else None

    assert address("52:54:00:00:00:01", "box", 500) == "10.0.0.3"
    assert address("52:54:00:00:00:01", "box", 2500) == "10.0.0.3"
    # Its own have expired: what is left is one whose MAC nobody knows.
    assert address("52:54:00:00:00:01", "box", 3000) == "10.0.0.8"
    assert address("52:54:00:00:00:01", "other", 3000) is None
    assert address("52:54:00:00:00:03", "BOX", 0) == "10.0.0.8"
    assert address("52:54:00:00:00:03", "", 0) is None


def test_the_same_client_in_several_files(tmp_path: Path) -> None:
    old = source(tmp_path, f"1000 {MAC} 10.0.0.1 box *", name="old")
    new = source(tmp_path, f"2000 {MAC} 10.0.0.2 box *", name="new")
    for files in ([old, new], [new, old]):
        found = find(files, MAC, "box", 0)
        assert found is not None
        assert found.lease.address == "10.0.0.2"
        assert found.source == f"{new.path} (dnsmasq)"


def test_the_ancestors_bug_the_newest_macos_entry_wins() -> None:
    found = find([LeaseFile(FILES / "macos.leases", "macos")], "52:54:00:02:d8:f0", "box", 0)
    assert found is not None
    assert found.lease.address == "192.168.64.7"


def test_a_file_that_comes_changes_and_goes(tmp_path: Path) -> None:
    path = tmp_path / "leases"
    file = LeaseFile(path, "dnsmasq")
    assert (file.leases(), file.fault) == ((), "not there")
    path.write_text("")
    assert (list(file.leases()), file.fault) == ([], "no leases in it")
    path.write_text(f"1000 {MAC} 10.0.0.1 box *\n")
    assert [lease.address for lease in file.leases()] == ["10.0.0.1"]
    assert file.fault == ""
    # Overwritten in place with as many bytes, a moment later.
    path.write_text(f"1000 {MAC} 10.0.0.2 box *\n")
    assert [lease.address for lease in file.leases()] == ["10.0.0.2"]
    other = tmp_path / "other"
    other.write_text(f"1000 {MAC} 10.0.0.3 box *\n")
    other.replace(path)
    assert [lease.address for lease in file.leases()] == ["10.0.0.3"]
    path.unlink()
    assert (list(file.leases()), file.fault) == ([], "not there")
    path.mkdir()
    assert (list(file.leases()), file.fault) == ([], "is a directory")


def test_a_file_replaced_and_truncated_while_it_is_read(tmp_path: Path) -> None:
    """Whatever is read in between, an address that was never given out is never seen."""
    path = tmp_path / "leases"
    given_out = {f"10.0.{third}.{fourth}" for third in range(4) for fourth in (1, 11, 111)}
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            chosen = sorted(given_out)[: 1 + number % len(given_out)]
            text = "".join(f"{2000 + number} {MAC} {address} box *\n" for address in chosen)
            if number % 3 == 0:
                part = tmp_path / "part"
                part.write_text(text)
                part.replace(path)
                continue
            # As dnsmasq does: over the old content, in pieces, then cut.
            with path.open("r+" if path.exists() else "w") as stream:
                for start in range(0, len(text), 17):
                    stream.write(text[start : start + 17])
                    stream.flush()
                stream.truncate()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        file = LeaseFile(path, "dnsmasq")
        seen = 0
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            found = file.leases()
            seen += bool(found)
            assert {lease.address for lease in found} <= given_out
        assert seen > 10
    finally:
        stop.set()
        writer.join()


def test_named_sources(tmp_path: Path) -> None:
    assert named_source("isc:/a/b") == LeaseFile(Path("/a/b"), "isc")
    assert named_source("/a/b:c") == LeaseFile(Path("/a/b:c"))
    assert named_source(f"{tmp_path}/not there").fault == ""
    with pytest.raises(UserError, match="no format 'kea'"):
        named_source("kea:/a/b")
    with pytest.raises(UserError, match="is a directory"):
        named_source(str(tmp_path))


def test_default_sources() -> None:
    assert [file.name for file in default_sources(None, "Darwin")] == ["/var/db/dhcpd_leases (macos)"]
    names = [file.name for file in default_sources("virbr0", "Linux")]
    assert names[0] == "/var/lib/libvirt/dnsmasq/virbr0.status (libvirt)"
    assert "/var/lib/systemd/network/dhcp-server-lease/virbr0 (networkd)" in names
    assert "/var/lib/misc/dnsmasq.leases (dnsmasq)" in names
    assert {name.rpartition("(")[2] for name in names} == {"libvirt)", "networkd)", "dnsmasq)", "isc)"}


def test_macs_and_client_identifiers() -> None:
    assert parse_mac("2:D8:0:a-b-c".replace("-", ":")) == "02:d8:00:0a:0b:0c"
    assert parse_mac("52-54-00-12-34-56") == MAC
    for wrong in ("", "52:54:00:12:34", "52:54:00:12:34:567", "g2:54:00:12:34:56", f"{MAC}:00"):
        assert parse_mac(wrong) is None
    octets = bytes.fromhex(MAC.replace(":", ""))
    assert mac_of_client_id(b"\1" + octets) == MAC
    assert mac_of_client_id(b"\xff----\0\1\0\1tttt" + octets) == MAC
    assert mac_of_client_id(b"\xff----\0\3\0\1" + octets) == MAC
    for other in (
        b"",
        b"\1" + octets[:5],
        b"\xff----\0\2\0\0\xab\x11" + octets,
        b"\xff----\0\3\0\6" + octets,
        b"\0box",
    ):
        assert mac_of_client_id(other) is None


# Properties --------------------------------------------------------------------------------------

some_mac = st.binary(min_size=6, max_size=6).map(lambda octets: ":".join(f"{octet:02x}" for octet in octets))
some_lease = st.builds(
    Lease,
    address=st.tuples(st.just(10), *[st.integers(0, 255)] * 2, st.integers(1, 254)).map(
        lambda t: ".".join(map(str, t))
    ),
    mac=some_mac,
    hostname=st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
    expires=st.integers(1, (1 << 32) - 1).map(float),
)
several = st.lists(some_lease, max_size=6, unique_by=lambda lease: lease.address)


def write_dnsmasq(given: list[Lease]) -> str:
    return "".join(f"{each.expires:.0f} {each.mac} {each.address} {each.hostname} 01:{each.mac}\n" for each in given)


def write_libvirt(given: list[Lease]) -> str:
    return json.dumps(
        [
            {
                "ip-address": each.address,
                "mac-address": each.mac,
                "hostname": each.hostname,
                "expiry-time": int(each.expires or 0),
            }
            for each in given
        ],
        indent=2,
    )


def numbers(mac: str | None) -> list[int]:
    return [int(octet, 16) for octet in str(mac).split(":")]


def write_networkd(given: list[Lease]) -> str:
    entries = [
        {
            "ClientId": [1, *numbers(each.mac)],
            "Address": [int(part) for part in each.address.split(".")],
            "Hostname": each.hostname,
            "ExpirationRealtimeUSec": int(each.expires or 0) * 10**6,
        }
        for each in given
    ]
    return json.dumps({"BootID": "0" * 32, "Leases": entries})


def write_macos(given: list[Lease]) -> str:
    return "".join(
        f"{{\n\tname={each.hostname}\n\tip_address={each.address}\n"
        f"\thw_address=1,{':'.join(f'{number:x}' for number in numbers(each.mac))}\n"
        f"\tlease=0x{int(each.expires or 0):x}\n}}\n"
        for each in given
    )


def write_isc(given: list[Lease]) -> str:
    return "".join(
        f"lease {each.address} {{\n  ends {time.strftime('%w %Y/%m/%d %H:%M:%S', time.gmtime(each.expires))};\n"
        f'  binding state active;\n  hardware ethernet {each.mac};\n  client-hostname "{each.hostname}";\n}}\n'
        # The newest is the last of a log.
        for each in reversed(given)
    )


WRITERS: dict[str, Callable[[list[Lease]], str]] = {
    "dnsmasq": write_dnsmasq,
    "libvirt": write_libvirt,
    "networkd": write_networkd,
    "macos": write_macos,
    "isc": write_isc,
}
formats = pytest.mark.parametrize("kind", WRITERS)


@formats
@given(given_out=several)
def test_what_was_written_is_read(kind: str, given_out: list[Lease]) -> None:
    assert FORMATS[kind](WRITERS[kind](given_out)) == given_out


@formats
@given(given_out=several, share=st.floats(0, 1))
def test_a_file_cut_anywhere_shows_no_lease_that_was_not_given(kind: str, given_out: list[Lease], share: float) -> None:
    text = WRITERS[kind](given_out)
    assert set(FORMATS[kind](text[: int(len(text) * share)])) <= set(given_out)


@formats
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(data=st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda data: data.decode("utf-8", "replace"))))
def test_anything_is_survived(kind: str, data: str) -> None:
    for lease in (*FORMATS[kind](data), *detect(data)(data)):
        assert isinstance(lease, Lease)


@given(value=st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
       lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
           st.sampled_from(["Leases", "Address", "ClientId", "HardwareAddress", "Hostname", "ExpirationRealtimeUSec",
                            "ip-address", "mac-address", "expiry-time", "hostname"]), inner, max_size=6),
       max_leaves=20))  # fmt: skip
def test_json_of_any_shape_is_survived(value: object) -> None:
    text = json.dumps(value)
    leases.libvirt.parse(text)
    leases.networkd.parse(text)
