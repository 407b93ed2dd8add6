"""The compiler Buildroot builds with: its own, one assembled from this machine's Debian packages, or
any relocatable toolchain.

Building gcc and glibc takes the better part of an hour on two cores. Buildroot accepts an external
toolchain instead, but not a distribution's compiler in place: it wants the C library in a sysroot
of its own. `assemble` copies the installed compiler into one directory (gcc finds its parts
relative to itself) and lays the C library out the way Buildroot looks for it:

    usr/            gcc, binutils and what belongs to the compiler
    sysroot/        C library, kernel headers, libstdc++: multiarch directories flattened
    bin/            wrappers: <triplet>-gcc = usr/bin/<triplet>-gcc-N --sysroot=…/sysroot

The image then carries Debian's own C library, so its source obligations are those of the Debian
packages recorded in `packages`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from hostos.build import cache
from hostos.build.profile import Option
from hostos.errors import UserError, failure
from hostos.steps import Step

INTERNAL = "internal"
DEBIAN = "debian"
TRIPLET = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}

# Raised when the layout changes, so that an assembled toolchain of an older hostos is not reused.
LAYOUT = 2

_COMPILER = ("gcc-{n}", "cpp-{n}", "g++-{n}", "libgcc-{n}-dev", "libstdc++-{n}-dev", "binutils", "binutils-{deb}")
_LIBRARY = ("libc6", "libc6-dev", "linux-libc-dev", "libgcc-s1", "libstdc++6", "libatomic1", "libgomp1")
# Of binutils only the tools named after the target are wanted.
_TOOLS = ("addr2line", "ar", "as", "c++filt", "elfedit", "gprof", "ld", "ld.bfd", "ld.gold", "nm", "objcopy",
          "objdump", "ranlib", "readelf", "size", "strings", "strip")  # fmt: skip
# Shared by several packages but replaced in the image: libxcrypt is built from source.
_NOT_OURS = re.compile(r"/(libcrypt\.|libcrypt-|crypt\.h$|libnsl\.a$)")


@dataclass(frozen=True)
class Toolchain:
    """What to build with. `options`: the Buildroot symbols that select it (without BR2_);
    `packages`: Debian packages it was assembled from (name -> version); `identity` goes into cache
    keys and the manifest."""

    kind: str
    identity: str
    options: tuple[Option, ...]
    path: Path | None = None
    packages: dict[str, str] = field(default_factory=dict)


def choose(wanted: str, arch: str, series: str, source: Path, step: Step) -> Toolchain:
    """The toolchain for `--toolchain internal|debian|PATH`.

    `series`: the kernel series (`6.12`), whose headers the internal toolchain takes. `source`: the
    Buildroot tree. Raises `UserError` when it cannot be used for this architecture.
    """
    if wanted == INTERNAL:
        symbol = f"PACKAGE_HOST_LINUX_HEADERS_CUSTOM_{series.replace('.', '_')}"
        options = [_option("TOOLCHAIN_BUILDROOT_GLIBC", True), _option("TOOLCHAIN_BUILDROOT_CXX", True)]
        # Without this Buildroot does not know how new the headers are, and silently drops systemd.
        options.append(_option(symbol, True))
        return Toolchain(INTERNAL, INTERNAL, tuple(options))
    if wanted == DEBIAN:
        path, packages = assemble(arch, step)
        described = describe(path, source, arch)
        return Toolchain(DEBIAN, json.dumps(packages, sort_keys=True), described, path, packages)
    path = Path(wanted).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"--toolchain {wanted}: there is no such directory", "internal, debian, or the directory of one"
        )
    options_found = describe(path, source, arch)
    version = _ask(_compiler(path, arch), "-v")
    return Toolchain("external", f"{path}\n{version}", options_found, path)


def assemble(arch: str, step: Step) -> tuple[Path, dict[str, str]]:
    """The toolchain made of the build machine's packages, and their versions; kept in the cache.

    Raises `UserError` when this is not Debian (or like it), or packages are missing.
    """
    if os.uname().machine != arch:
        raise UserError(
            f"--toolchain debian assembles the compiler of this machine ({os.uname().machine}), not one for {arch}",
            "--toolchain internal builds a cross compiler; a directory names one you have",
        )
    if shutil.which("dpkg-query") is None or shutil.which("gcc") is None:
        raise UserError(
            "--toolchain debian needs Debian's gcc packages", "--toolchain internal, or a toolchain's directory"
        )
    triplet = TRIPLET[arch]
    number = _ask(Path("/usr/bin/gcc"), "-dumpversion").partition(".")[0]
    names = [name.format(n=number, deb=triplet.replace("_", "-")) for name in (*_COMPILER, *_LIBRARY)]
    packages = _versions(names)
    key = cache.digest({"packages": packages, "layout": LAYOUT, "arch": arch})
    if found := cache.find("toolchain", key):
        return found, packages
    step.progress("assembling a toolchain from this machine's packages")
    with cache.create("toolchain", key) as root:
        _copy_compiler(root, names[: len(_COMPILER)], triplet)
        _copy_sysroot(root, [*names[len(_COMPILER) :], f"libstdc++-{number}-dev"], triplet, number)
        _write_wrappers(root, triplet, number)
        _try(root, triplet)
        (root / "packages.json").write_text(json.dumps(packages, indent=1, sort_keys=True) + "\n")
    path = cache.find("toolchain", key)
    assert path is not None
    return path, packages


def describe(path: Path, source: Path, arch: str) -> tuple[Option, ...]:
    """The Buildroot symbols for the external toolchain in `path`, found by asking its compiler.

    Raises `UserError` when Buildroot could not use it: no compiler for `arch`, no glibc.
    """
    compiler = _compiler(path, arch)
    prefix = compiler.name.removesuffix("-gcc")
    number = _ask(compiler, "-dumpversion").partition(".")[0]
    libc = Path(_ask(compiler, "-print-file-name=libc.a"))
    if not libc.is_absolute():  # gcc answers with the bare name when it has none
        raise UserError(f"{compiler} has no libc.a, by which Buildroot finds the sysroot", "another --toolchain")
    prefixed = libc.resolve().parent.parent
    sysroot = prefixed.parent if prefixed.name == "usr" else prefixed
    if not any(sysroot.glob("lib*/ld-linux*.so.*")):
        raise UserError(
            f"{path} is no glibc toolchain (no ld-linux*.so in {sysroot}), which systemd needs", "--toolchain internal"
        )
    options = [
        _option("TOOLCHAIN_EXTERNAL", True),
        _option("TOOLCHAIN_EXTERNAL_CUSTOM", True),
        _option("TOOLCHAIN_EXTERNAL_PATH", str(path)),
        _option("TOOLCHAIN_EXTERNAL_CUSTOM_PREFIX", prefix),
        _option(f"TOOLCHAIN_EXTERNAL_GCC_{number}", True),
        _option(f"TOOLCHAIN_EXTERNAL_HEADERS_{_headers(sysroot, source)}", True),
        _option("TOOLCHAIN_EXTERNAL_CUSTOM_GLIBC", True),
        _option("TOOLCHAIN_EXTERNAL_INET_RPC", (sysroot / "usr/include/rpc/rpc.h").exists()),
        _option("TOOLCHAIN_EXTERNAL_CXX", (path / "bin" / f"{prefix}-g++").exists()),
        _option("TOOLCHAIN_EXTERNAL_OPENMP", Path(_ask(compiler, "-print-file-name=libgomp.spec")).is_absolute()),
    ]
    if _has_fortran(path, prefix):
        options.append(_option("TOOLCHAIN_EXTERNAL_FORTRAN", True))
    return tuple(options)


def _option(symbol: str, value: bool | str) -> Option:
    return Option(symbol, value, "toolchain", Path("--toolchain"))


def _compiler(path: Path, arch: str) -> Path:
    found = sorted(path.glob(f"bin/{arch}-*-gcc"))
    if not found:
        raise UserError(
            f"{path} holds no compiler for {arch} (bin/{arch}-…-gcc)",
            "name the directory that has `bin` in it",
        )
    return found[0]


def _headers(sysroot: Path, source: Path) -> str:
    """The newest `X_Y` Buildroot knows that is not newer than the sysroot's kernel headers."""
    text = (sysroot / "usr/include/linux/version.h").read_text()
    found = re.search(r"LINUX_VERSION_CODE (\d+)", text)
    code = int(found[1]) if found else 0
    have = (code >> 16, code >> 8 & 255)
    listing = (source / "toolchain/toolchain-external/toolchain-external-custom/Config.in.options").read_text()
    known = sorted(
        (int(a), int(b)) for a, b in re.findall(r"config BR2_TOOLCHAIN_EXTERNAL_HEADERS_(\d+)_(\d+)", listing)
    )
    usable = [each for each in known if each <= have]
    if not usable:
        raise UserError(
            f"the kernel headers in {sysroot} are {have[0]}.{have[1]}, too old for Buildroot", "another --toolchain"
        )
    return "{}_{}".format(*usable[-1])


def _has_fortran(path: Path, prefix: str) -> bool:
    return (path / "bin" / f"{prefix}-gfortran").exists()


def _versions(names: list[str]) -> dict[str, str]:
    shown = subprocess.run(
        ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Package} ${Version}\n", *names],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = {words[1]: words[2] for line in shown.splitlines() if (words := line.split())[0] == "installed"}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"--toolchain debian needs {', '.join(missing)}", f"apt-get install {' '.join(missing)}")
    return found


def _files(names: list[str]) -> list[Path]:
    """What the installed packages put on this machine; directories left out."""
    listing = subprocess.run(["dpkg-query", "--listfiles", *names], capture_output=True, text=True, check=True).stdout
    paths = {Path(line) for line in listing.splitlines() if line.startswith("/")}
    return sorted(path for path in paths if path.is_symlink() or path.is_file())


def _put(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        return
    if path.is_symlink():
        target.symlink_to(path.readlink())
    else:
        shutil.copy2(path, target)


def _copy_compiler(root: Path, names: list[str], triplet: str) -> None:
    wanted = (f"/usr/lib/gcc/{triplet}/", "/usr/include/c++/", f"/usr/include/{triplet}/c++/", f"/usr/bin/{triplet}-")
    for path in _files(names):
        if str(path).startswith(wanted):
            _put(path, root / str(path)[1:])
    # gcc calls the assembler and linker of <prefix>/<triplet>/bin before those of PATH.
    own = root / "usr" / triplet / "bin"
    own.mkdir(parents=True)
    for tool in _TOOLS:
        if (root / "usr/bin" / f"{triplet}-{tool}").exists():
            (own / tool).symlink_to(f"../../bin/{triplet}-{tool}")


def _copy_sysroot(root: Path, names: list[str], triplet: str, number: str) -> None:
    sysroot = root / "sysroot"
    usr, lib = sysroot / "usr/lib", sysroot / "lib"
    flat = {
        f"/usr/include/{triplet}/": sysroot / "usr/include",
        f"/usr/lib/{triplet}/": usr,
        f"/lib/{triplet}/": lib,
        "/lib64/": lib,
        "/usr/include/": sysroot / "usr/include",
    }
    for path in _files(names):
        text = str(path)
        if _NOT_OURS.search(text) or "/c++/" in text or "/gconv/" in text or "/audit/" in text:
            continue
        for prefix, target in flat.items():
            if text.startswith(prefix):
                _put(path, target / text[len(prefix) :])
                break
    for name in ("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"):
        real = Path("/lib64" if "x86" in name else "/lib") / name
        if real.exists() and triplet.partition("_")[0] in name.replace("x86-64", "x86_64"):
            (lib / name).unlink(missing_ok=True)
            shutil.copy2(real.resolve(), lib / name)
    (sysroot / "lib64").symlink_to("lib")
    (sysroot / "usr/lib64").symlink_to("lib")
    # libstdc++ and its like lie in gcc's own directory; there Buildroot would take the whole of it
    # for support libraries.
    gcc = root / "usr/lib/gcc" / triplet / number
    for path in sorted(gcc.glob("lib*.so")):
        if path.is_symlink():
            name = path.readlink().name
            path.unlink()
            if (usr / name).exists():
                (usr / path.name).symlink_to(name)
            elif (lib / name).exists():
                (usr / path.name).symlink_to(f"../../lib/{name}")
    for name in ("libstdc++.a", "libsupc++.a"):
        shutil.move(gcc / name, usr / name)
    _relocate(sysroot, triplet)


def _relocate(sysroot: Path, triplet: str) -> None:
    """Linker scripts and absolute links that name the multiarch directories."""
    usr = sysroot / "usr/lib"
    for path in sorted([*usr.iterdir(), *(sysroot / "lib").iterdir()]):
        if path.is_symlink():
            target = path.readlink()
            if target.is_absolute():
                path.unlink()
                here = "" if path.parent.name == "lib" and path.parent.parent == sysroot else "../../lib/"
                path.symlink_to(f"{here}{target.name}")
        elif path.suffix in (".so", ".a") and path.stat().st_size < 4096:
            data = path.read_bytes()
            if b"GROUP" in data or b"INPUT" in data:
                path.write_bytes(data.replace(f"/{triplet}/".encode(), b"/"))


def _write_wrappers(root: Path, triplet: str, number: str) -> None:
    directory = root / "bin"
    directory.mkdir()
    # Buildroot links to these from elsewhere: the real place is found through the link, or gcc-ar
    # would not find its plug-in.
    head = '#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")/..\n'
    for name in ("gcc", "g++", "cpp"):
        _script(
            directory / f"{triplet}-{name}",
            f'{head}exec "$here/usr/bin/{triplet}-{name}-{number}" --sysroot="$here/sysroot" "$@"\n',
        )
    for name in ("gcc-ar", "gcc-nm", "gcc-ranlib"):
        _script(directory / f"{triplet}-{name}", f'{head}exec "$here/usr/bin/{triplet}-{name}-{number}" "$@"\n')
    for name in _TOOLS:
        if (root / "usr/bin" / f"{triplet}-{name}").exists():
            _script(directory / f"{triplet}-{name}", f'{head}exec "$here/usr/bin/{triplet}-{name}" "$@"\n')


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _try(root: Path, triplet: str) -> None:
    """Compile and link a C and a C++ program, and look that nothing outside was used.

    Raises `UserError` (status 1) when that does not work: better now than after an hour.
    """
    for suffix, code in (
        (
            "c",
            '#include <stdio.h>\n#include <math.h>\nint main(int c, char **v) { return printf("%f", sin(c)) < 0; }\n',
        ),
        ("cc", "#include <iostream>\n#include <thread>\nint main() { std::thread([] { std::cout << 1; }).join(); }\n"),
    ):
        program = root / f"try.{suffix}"
        program.write_text(code)
        compiler = root / "bin" / f"{triplet}-{'gcc' if suffix == 'c' else 'g++'}"
        command = [str(compiler), "-pthread", str(program), "-lm", "-o", str(root / "try"), "-Wl,-t", "-v"]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            raise failure(f"the assembled toolchain does not work:\n{tried.stderr[-1500:]}", "--toolchain internal")
        strays = [line for line in tried.stdout.splitlines() if line.startswith(("/usr/", "/lib"))]
        if strays:
            raise failure(f"the assembled toolchain reaches outside of itself: {strays[0]}", "--toolchain internal")
        program.unlink()
        (root / "try").unlink()


def _ask(compiler: Path, question: str) -> str:
    try:
        answer = subprocess.run(
            [compiler, question],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise UserError(f"{compiler} cannot be run: {error}", "another --toolchain") from None
    return (answer.stdout or answer.stderr).strip()
