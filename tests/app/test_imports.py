"""What the page's start leaves out of its imports."""

import importlib
import importlib.util
import sys

from flatlora_diffusion.app.imports import do_without, without_stubs


def test_gradio_writes_no_stubs_of_its_own_sources(tmp_path, monkeypatch):
    """With a stand-in: gradio itself is imported once in all tests."""
    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio" / "__init__.py").touch()
    writer = tmp_path / "gradio" / "component_meta.py"
    writer.write_text("def create_or_modify_pyi(kind, name, events):\n    raise OSError(name)\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    with without_stubs():
        made = importlib.import_module("gradio.component_meta")
    assert made.__file__ == str(writer)
    assert made.create_or_modify_pyi(object, "Button", []) is None
    assert sys.meta_path == finders
    for name in ("gradio", "gradio.component_meta"):
        monkeypatch.delitem(sys.modules, name)


def test_gradio_still_has_what_is_left_out():
    """Or its stubs would be written again, and the start would take longer, unnoticed."""
    assert callable(importlib.import_module("gradio.component_meta").create_or_modify_pyi)


def test_a_package_that_nobody_needs_is_said_not_to_be_there(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    do_without("colorsys")
    try:
        assert importlib.util.find_spec("colorsys") is None
    finally:
        del sys.modules["colorsys"]
    do_without("sys")
    assert sys.modules["sys"] is sys
