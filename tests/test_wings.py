"""The wings as `docs/ARCHITECTURE.md` shows them; what may import what, import-linter checks."""

import functools
from pathlib import Path

import grimp

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
