"""In which order the files of a tree lie in its layer.

A container that starts reads the loader, libc, its init or interpreter, and little else. Lying
together they are fetched in few pieces; scattered over the image each costs a round trip. This is
only a good guess for an image that nobody has booted yet, and fixed, so that it never changes an
image's hash by chance.
"""

from __future__ import annotations

import re

_PYTHON = rb"usr/(local/)?lib/python3(\.\d+)?/"
_PYTHON_START = rb"(abc|codecs|io|os|posixpath|genericpath|site|stat|_collections_abc|_sitebuiltins|sitecustomize)"

# Earlier patterns come first; files of one pattern and those of none are in order of their paths.
_PATTERNS = (
    rb"(usr/)?(lib|lib64|lib/[^/]+)/(ld-linux|ld-musl|ld64|ld-)[^/]*",
    rb"(usr/)?lib(64)?(/[^/]+)?/(libc|libm|libdl|libpthread|libtinfo|libselinux|libpcre2-8|libcap|libgcc_s)[.-][^/]*",
    rb"(usr/)?bin/(sh|dash|bash|busybox|env|cat|ls|true|id|uname|sleep|echo|printf|mkdir|mount|login)",
    rb"etc/(passwd|group|shadow|nsswitch\.conf|os-release|ld\.so\.cache|profile|bash\.bashrc|hosts|localtime)",
    rb"usr/lib/os-release",
    rb"usr/lib/(x86_64|aarch64)[^/]*/(libz|libexpat|libssl|libcrypto|libzstd|liblzma|liblz4|libbz2|libffi)[.-][^/]*",
    rb"(usr/)?lib/systemd/(systemd|systemd-executor|libsystemd-(core|shared)-[^/]*)",
    rb"usr/lib/(x86_64|aarch64)[^/]*/systemd/libsystemd-(core|shared)-[^/]*",
    rb"usr/lib/(x86_64|aarch64)[^/]*/lib(mount|blkid|seccomp|audit|crypt|acl|apparmor|kmod|pam|uuid|ip4tc)[.-][^/]*",
    rb"(usr/)?lib/systemd/systemd-[^/]*",
    rb"(usr/)?lib/systemd/(system|system-generators|system-preset)/.*",
    rb"etc/systemd/.*",
    rb"usr/bin/(dbus-daemon|dbus-broker|journalctl|systemctl|systemd-[^/]*|udevadm)",
    rb"usr/(local/)?bin/(python3(\.\d+)?|pypy3?|perl|ruby|node|nodejs|lua[^/]*)",
    rb"usr/(local/)?lib/libpython[^/]*",
    _PYTHON + rb"encodings/(__pycache__/)?(__init__|aliases|utf_8)\..*",
    _PYTHON + rb"(__pycache__/)?" + _PYTHON_START + rb"\..*",
    _PYTHON + rb".*",
)
_ORDER = re.compile(b"|".join(b"(?P<p%d>%s)" % (n, pattern) for n, pattern in enumerate(_PATTERNS)))


def boot_rank(path: bytes) -> int:
    """Sort key for the place of a file's content in a layer: small ones first."""
    match = _ORDER.fullmatch(path)
    # lastgroup: the group that was closed last, so the outermost, which is the named one
    return int(match.lastgroup[1:]) if match and match.lastgroup else len(_PATTERNS)
