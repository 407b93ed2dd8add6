"""The guest's command-line service, run under a real shell against a reference in Python that
follows the kernel's next_arg() (lib/cmdline.c)."""

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[3] / "overlay/usr/lib/hostos/cmdline"
SHELL = shutil.which("dash")
BUSYBOX = shutil.which("busybox")
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJzug3U3t57aq8K4cuUb3hKX3M4xCbXgPnDCO8dQPHru"
RSA = "ssh-rsa AAAAB3NzaC1yc2EA" + "A" * 520

pytestmark = pytest.mark.skipif(not SHELL, reason="dash is not installed")


def reference(line):
    """(hostname, keys) as the service must find them."""
    hostname, keys = None, []
    for name, value in arguments(line):
        if name in ("hostos.hostname", "host"):
            hostname = value if valid_hostname(value) else hostname
        elif name == "sshkey":
            add(keys, value)
        elif name == "hostos.ssh_key":
            try:
                assert re.fullmatch(r"[A-Za-z0-9_=-]+", value)
                add(keys, base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode())
            except (AssertionError, ValueError):
                pass
    return hostname, keys


def add(keys, line):
    found = re.fullmatch(
        r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp[0-9]\S*|sk-ssh-ed25519@openssh.com|sk-ecdsa-sha2-nistp256@openssh.com)"
        r" (AAAA[A-Za-z0-9+/=]*)( .*)?",
        line,
    )
    if found and len(found[2]) >= 60 and line not in keys:
        keys.append(line)


def valid_hostname(name):
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return len(name) <= 64 and re.fullmatch(rf"{label}(\.{label})*", name) is not None


def arguments(line):
    """lib/cmdline.c, statement by statement."""
    text = line
    while text := text.lstrip(" \t"):
        quoted = text.startswith('"')
        if quoted:
            text = text[1:]
        inside, equals, i = quoted, 0, 0
        while i < len(text) and not (text[i] in " \t" and not inside):
            if not equals and text[i] == "=":
                equals = i
            if text[i] == '"':
                inside = not inside
            i += 1
        token, text = text[:i], text[i:]
        if not equals:
            if (token[:-1] if quoted and token.endswith('"') else token) == "--":
                return
            continue
        value = token[equals + 1 :]
        closed = False
        if value.startswith('"'):
            value = value[1:]
            if value.endswith('"'):
                value, closed = value[:-1], True
        if quoted and not closed and value.endswith('"'):
            value = value[:-1]
        yield token[:equals], value


def run(tmp_path, line, instance=None):
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    (root / "etc").mkdir(parents=True)
    (root / "run/hostos").mkdir(parents=True)
    for name, text in (instance or {}).items():
        path = root / "etc/hostos/instance" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    cmdline = tmp_path / "cmdline"
    cmdline.write_bytes(os.fsencode(line) + b"\n")
    tools = tmp_path / "bin"
    if not BUSYBOX and not tools.exists():
        # The same three programs from the machine itself.
        tools.mkdir()
        (tools / "busybox").write_text('#!/bin/sh\nexec "$@"\n')
        (tools / "busybox").chmod(0o755)
    done = subprocess.run(
        [SHELL, SCRIPT],
        env={"ROOT": str(root), "CMDLINE": str(cmdline), "PATH": f"{tools}:{os.environ['PATH']}", "LC_ALL": "C"},
        capture_output=True,
        check=True,
        timeout=20,
    )
    hostname = root / "etc/hostname"
    keys = root / "root/.ssh/authorized_keys"
    return (
        hostname.read_text().strip() if hostname.exists() else None,
        keys.read_text().splitlines() if keys.exists() else [],
        done.stderr.decode(errors="replace"),
    )


def encoded(line):
    return base64.urlsafe_b64encode(line.encode()).decode().rstrip("=")


def test_the_contract(tmp_path):
    keys = f"hostos.ssh_key={encoded(ED25519 + ' me@home')} hostos.ssh_key={encoded(RSA)}"
    line = f"console=ttyS0 quiet hostos.hostname=vm-1 {keys}"
    hostname, keys, errors = run(tmp_path, line)
    assert (hostname, keys, errors) == ("vm-1", [f"{ED25519} me@home", RSA], "")
    written = tmp_path / "root/root/.ssh"
    assert written.stat().st_mode & 0o777 == 0o700
    assert (written / "authorized_keys").stat().st_mode & 0o777 == 0o600
    assert "127.0.1.1 vm-1" in (tmp_path / "root/etc/hosts").read_text()


def test_hyperos(tmp_path):
    hostname, keys, _ = run(tmp_path, f'host=hyper sshkey="{ED25519} some one"')
    assert (hostname, keys) == ("hyper", [f"{ED25519} some one"])


@pytest.mark.parametrize("quoted", ['"sshkey={} a b"', 'sshkey="{} a b"', 'sshkey="{} a b'])
def test_quotes_as_the_kernel_takes_them(tmp_path, quoted):
    assert run(tmp_path, quoted.format(ED25519))[1] == [f"{ED25519} a b"]


def test_names_are_exact(tmp_path):
    line = f'xhost=a hosts=b ghost=c host.name=d mysshkey="{ED25519}" hostos.hostnames=e'
    assert run(tmp_path, line)[:2] == (None, [])


def test_the_last_name_wins_and_keys_accumulate_once(tmp_path):
    line = f'host=a hostos.hostname=b sshkey="{ED25519}" sshkey="{ED25519}"'
    assert run(tmp_path, line)[:2] == ("b", [ED25519])


def test_what_follows_two_dashes_is_not_ours(tmp_path):
    assert run(tmp_path, "host=a -- host=b")[0] == "a"


@pytest.mark.parametrize(
    "name", ["-a", "a-", "a..b", ".a", "a.", "a_b", "ä", "a" * 65, "a" * 64, "x.-y", "$(id)", "`id`", "*"]
)
def test_an_invalid_host_name_is_reported_and_left_out(tmp_path, name):
    hostname, _, errors = run(tmp_path, f"host=good hostos.hostname={name}")
    assert hostname == "good"
    assert "not a valid host name" in errors


@pytest.mark.parametrize(
    "key",
    [
        "ssh-ed25519 short",
        "ssh-ed25519 AAAA",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "command=\\x ssh-rsa AAAA",
        "ssh-dss AAAAB3Nz",
        "*",
    ],
)
def test_an_invalid_key_is_reported_and_left_out(tmp_path, key):
    _, keys, errors = run(tmp_path, f"hostos.ssh_key={encoded(key)} hostos.ssh_key={encoded(ED25519)}")
    assert keys == [ED25519]
    assert "not an SSH public key" in errors


def test_what_is_not_base64_is_reported(tmp_path):
    _, keys, errors = run(tmp_path, "hostos.ssh_key=$$$ hostos.ssh_key=")
    assert keys == []
    assert errors.count("not base64url") == 2


def test_the_launchers_files_win(tmp_path):
    hostname, keys, _ = run(
        tmp_path, "host=outer", {"hostname": "inner\n", "authorized_keys": f"{ED25519} 1\n\nnonsense\n{RSA} 2"}
    )
    assert (hostname, keys) == ("inner", [f"{ED25519} 1", f"{RSA} 2"])


def test_what_the_launcher_decoded_is_taken_once(tmp_path):
    line = f"hostos.ssh_key={encoded(ED25519)} hostos.ssh_key={encoded(RSA)}"
    _, keys, errors = run(tmp_path, line, {"authorized_keys": f"{ED25519}\n", "encoded_keys": f"{encoded(ED25519)}\n"})
    assert sorted(keys) == sorted([ED25519, RSA])
    assert errors == ""


token = st.one_of(
    st.sampled_from(
        [
            "host=", "hostos.hostname=", "sshkey=", "hostos.ssh_key=", '"', " ", "=", "--", "quiet", ED25519,
            f" {RSA} c d", encoded(f"{ED25519} x"), "name.example", "-bad", "\t",
            "*", "?", "$(id)", "\\", "'", ";", "#", "a b",
        ]
    ),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=6),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(token, max_size=14).map("".join))
def test_any_line_is_read_as_the_kernel_reads_it(tmp_path, line):
    hostname, keys, _ = run(tmp_path, line)
    assert (hostname, keys) == reference(line)
