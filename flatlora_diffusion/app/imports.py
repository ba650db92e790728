"""Importing what the page is made of without work that it has no use for: seconds before it answers."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType

_WRITER = "gradio.component_meta"


class _WithoutStubs(MetaPathFinder):
    """Finds gradio's module that makes its components, and has it write no type stubs.

    At each import gradio parses its own sources, and writes stubs for editors beside them: more than a second
    of work, in an installation that another process may be reading. It has no setting for that.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname == _WRITER else None
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if hasattr(module, "create_or_modify_pyi"):  # else a version that does it otherwise
            module.create_or_modify_pyi = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def without_stubs() -> Iterator[None]:
    """Within the block gradio is imported without writing stubs; imported already, it stays as it is."""
    finder = _WithoutStubs()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def do_without(package: str) -> None:
    """Let libraries that ask whether a package is installed hear that it isn't; an imported one stays."""
    sys.modules.setdefault(package, None)  # pyright: ignore[reportArgumentType] (Python's own way to say so)
