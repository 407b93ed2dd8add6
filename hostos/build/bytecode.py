"""Python in the guest as byte code only: half the size, and nothing to compile at start."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hostos.build.run import run
from hostos.build.tree import Tree, from_package
from hostos.cpio import Entry
from hostos.errors import failure

# Directories with modules; what is below `usr/lib/hostos/python` is our own.
MODULES = ("usr/lib/python3", "usr/lib/python3.13", "usr/lib/hostos/python")

_COMPILE = """
import compileall, sys
sys.exit(not compileall.compile_dir(sys.argv[1], ddir="/" + sys.argv[2], quiet=1, legacy=True, force=True,
    optimize=0, invalidation_mode=__import__("py_compile").PycInvalidationMode.UNCHECKED_HASH))
"""


def compile_modules(tree: Tree, interpreter: Sequence[Path]) -> None:
    """Replace every `.py` module in `tree` by its byte code (`module.pyc` beside where it was).

    `interpreter`: .deb files with the guest's Python *for this machine's architecture* (`Lock.python_for`);
    it is unpacked and run by its own dynamic linker, so nothing needs root and no foreign binary runs.
    The byte code depends on the sources alone, not on the architecture. Raises `UserError` (status 1)
    when a module does not compile.
    """
    with tempfile.TemporaryDirectory(prefix="hostos-python-") as scratch:
        root = Path(scratch) / "root"
        for package in interpreter:
            _unpack(root, from_package(package, lambda path: not path.startswith("usr/share/")))
        loader = next(root.glob("usr/lib*/**/ld-linux-*.so.*"), None)
        python = next(root.glob("usr/bin/python3.*[0-9]"), None)
        if loader is None or python is None:
            raise failure("the locked packages hold no Python interpreter", "invoke build --update")
        libraries = ":".join(str(path) for path in root.glob("usr/lib/*-linux-gnu"))
        start: list[str | Path] = [loader, "--library-path", libraries, python, "-I", "-S"]
        compile_with(start, tree, {"PYTHONHOME": str(root / "usr")})


def compile_with(interpreter: Sequence[str | Path], tree: Tree, env: Mapping[str, str]) -> None:
    """Replace every `.py` module in `tree` by its byte code, as `interpreter` (a command, run with
    `env`) makes it. Raises `UserError` (status 1) when a module does not compile."""
    with tempfile.TemporaryDirectory(prefix="hostos-python-") as scratch:
        for directory in MODULES:
            sources = [entry for path, entry in tree.entries.items() if path.startswith(f"{directory}/")]
            if not any(str(entry.path).endswith(".py") for entry in sources):
                continue
            work = Path(scratch) / "modules"
            _unpack(work, (entry for entry in sources if str(entry.path).endswith(".py")))
            run(
                [*interpreter, "-c", _COMPILE, work / directory, directory],
                env={**env, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},
            )
            for compiled in sorted((work / directory).rglob("*.pyc")):
                tree.file(compiled.relative_to(work).as_posix(), compiled.read_bytes())
            tree.filter(_not_source(directory))


def _not_source(directory: str) -> Callable[[str, Entry], bool]:
    def keep(path: str, entry: Entry) -> bool:
        return not (path.startswith(f"{directory}/") and (path.endswith(".py") or "/__pycache__" in path))

    return keep


def _unpack(root: Path, entries: Iterable[Entry]) -> None:
    """Plain files and links only, with the user's own ownership: enough to run or compile them."""
    for entry in entries:
        path = root / str(entry.path)
        if stat.S_ISDIR(entry.mode):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISLNK(entry.mode):
            path.unlink(missing_ok=True)
            path.symlink_to(entry.data.decode())
        elif stat.S_ISREG(entry.mode):
            path.write_bytes(entry.data)
            path.chmod(entry.mode & 0o777)
