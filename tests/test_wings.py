"""The wings as `docs/ARCHITECTURE.md` shows them; what may import what, import-linter checks."""

import functools
import sys
from pathlib import Path

import grimp
import pytest

PACKAGE = "flatlora_diffusion"
LONGEST = 12  # files that one has to know of, from a command down to the ground


def test_no_chain_of_imports_is_longer_than_a_reader_can_follow():
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True)
    faces = {module for module in graph.modules if Path(*module.split("."), "__init__.py").is_file()}

    @functools.cache
    def chain(module: str) -> tuple[str, ...]:
        below = graph.find_modules_directly_imported_by(module) - faces
        return (module, *max((chain(other) for other in below), key=len, default=()))

    longest = max((chain(module) for module in graph.modules - faces), key=len)
    assert len(longest) <= LONGEST, " -> ".join(longest)


@pytest.mark.parametrize(("wing", "allowed"), [("flat", {"torch", "peft"}), ("sheet", {"PIL"})])
def test_a_wing_that_others_could_take_needs_little(wing, allowed):
    graph = grimp.build_graph(PACKAGE, include_external_packages=True, exclude_type_checking_imports=True)
    own = f"{PACKAGE}.{wing}"
    for module in {own, *graph.find_descendants(own)}:
        imported = {name.partition(".")[0] for name in graph.find_modules_directly_imported_by(module)}
        assert imported - sys.stdlib_module_names <= allowed | {PACKAGE}, module
