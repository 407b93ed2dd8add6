import shutil
import subprocess

import pytest

from hostos.build.elf import needs
from hostos.build.load_order import unify
from hostos.build.tree import Tree

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
SOURCE = '#include <stdio.h>\nint main(void) { puts("works"); return 0; }\n'


def program(directory, *libraries):
    """The bytes of a program that needs these, in this order."""
    source, target = directory / "program.c", directory / "-".join(libraries)
    source.write_text(SOURCE)
    linked = [f"-l{name}" for name in libraries]
    subprocess.run(["gcc", "-o", target, source, "-nodefaultlibs", "-Wl,--no-as-needed", *linked], check=True)
    return target.read_bytes()


def test_programs_load_their_libraries_in_one_order(tmp_path):
    tree = Tree()
    for number, libraries in enumerate((("m", "c", "gcc_s"), ("gcc_s", "m", "c"), ("c", "m"), ("c",))):
        tree.file(f"usr/bin/{number}", program(tmp_path, *libraries), 0o755)
    tree.file("usr/bin/script", "#!/bin/sh\n", 0o755)
    assert unify(tree) == 2

    def loads(path):
        return [name for name in needs(tree.data(path)).libraries if not name.startswith("ld-")]

    assert loads("usr/bin/0") == loads("usr/bin/1") == ["libc.so.6", "libm.so.6", "libgcc_s.so.1"]
    assert loads("usr/bin/2") == ["libc.so.6", "libm.so.6"]
    for number in range(4):
        changed = tmp_path / "changed"
        changed.write_bytes(tree.data(f"usr/bin/{number}"))
        changed.chmod(0o755)
        assert subprocess.run([changed], capture_output=True, check=True).stdout == b"works\n"
        changed.unlink()
    assert unify(tree) == 0


def test_libraries_keep_theirs(tmp_path):
    tree = Tree()
    library = tmp_path / "library.so"
    (tmp_path / "library.c").write_text("int answer(void) { return 42; }\n")
    command = ["gcc", "-shared", "-o", library, tmp_path / "library.c", "-nodefaultlibs", "-Wl,--no-as-needed", "-lm"]
    subprocess.run([*command, "-lc"], check=True)
    tree.file("usr/lib/x86_64-linux-gnu/library.so", library.read_bytes())
    tree.file("usr/bin/one", program(tmp_path, "c"), 0o755)
    assert unify(tree) == 0
    assert tree.data("usr/lib/x86_64-linux-gnu/library.so") == library.read_bytes()


@pytest.mark.parametrize("size", [4, 20, 64, 200, 2000])
def test_damaged_programs_are_left_alone(tmp_path, size):
    tree = Tree()
    data = program(tmp_path, "m", "c")[:size]
    tree.file("usr/bin/cut", data, 0o755)
    assert unify(tree) == 0
    assert tree.data("usr/bin/cut") == data
