"""Import rules that neither import-linter nor ruff can express."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cmkd_scale

PACKAGE = Path(cmkd_scale.__file__).parent
HEAVY = ("torch", "transformers", "accelerate", "faiss", "matplotlib", "webdataset")


def imported_names(source: str) -> set[str]:
    """Full dotted names that a module imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_imported_names_sees_every_form() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    from g.h import i, j\n"
    assert imported_names(source) == {"a.b", "d.e", "g.h.i", "g.h.j"}


def test_modalities_takes_only_the_audio_utilities_of_transformers() -> None:
    names = imported_names((PACKAGE / "data" / "modalities.py").read_text("utf-8"))
    taken = {name for name in names if name.split(".")[0] == "transformers"}
    assert taken
    assert all((name + ".").startswith("transformers.audio_utils.") for name in taken)


def test_the_package_needs_neither_tests_nor_tools() -> None:
    for file in PACKAGE.rglob("*.py"):
        rooms = {name.split(".")[0] for name in imported_names(file.read_text("utf-8"))}
        assert rooms.isdisjoint({"tests", "tools"}), file


@pytest.mark.parametrize("module", ["cmkd_scale", "cmkd_scale.cli"])
def test_starting_the_program_loads_nothing_heavy(module: str) -> None:
    program = f"import sys, {module}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
