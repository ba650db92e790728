"""The wheel, installed where nothing of the repository is, has all that the commands need."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
COMMANDS = ("train", "app", "grid", "sheet", "evaluate", "kohya", "captions")


def run(*words: str | Path, folder: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def done(process: subprocess.Popen) -> str:
    told = process.communicate()[0]
    assert process.returncode == 0, told
    return told


@pytest.mark.process
def test_an_installed_package_has_its_commands(tmp_path):
    source, environment = tmp_path / "source", tmp_path / "environment"
    shutil.copytree(PROJECT / "flatlora_diffusion", source / "flatlora_diffusion")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    made = run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir")
    done(run(*pip, "wheel", "--no-build-isolation", "--no-deps", source, folder=tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    version = re.search(r'^version = "(.*)"$', (source / "pyproject.toml").read_text("utf-8"), re.M)[1]
    assert wheel.name == f"flatlora_diffusion-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        within = set(file.namelist())
    assert {"flatlora_diffusion/py.typed", "flatlora_diffusion/app/style.css"} <= within
    assert not [name for name in within if name.startswith(("tests/", "benchmarks/", "tools/"))]

    done(made)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    done(run(*pip, "--python", python, "install", "--no-index", "--no-deps", wheel, folder=tmp_path))
    # What is there is found, but its .pth files aren't read: one of them finds this very project.
    paths = {"base": str(environment), "platbase": str(environment)}
    linked = Path(sysconfig.get_path("purelib", "venv", paths), "linked.pth")
    linked.write_text(sysconfig.get_path("purelib"), encoding="utf-8")

    code = """if True:
        import importlib.metadata, flatlora_diffusion
        print(importlib.metadata.version("flatlora_diffusion"), flatlora_diffusion.__file__)
    """
    told = run(python, "-c", code, folder=tmp_path)
    helps = {name: run(scripts / f"flatlora-{name}", "--help", folder=tmp_path) for name in COMMANDS}
    assert done(told).split() == [version, str(linked.parent / "flatlora_diffusion" / "__init__.py")]
    for name, process in helps.items():
        assert done(process).startswith(f"usage: flatlora-{name} ")


def test_every_command_answers_help_without_a_slow_import():
    code = """if True:
        import importlib, sys
        for home in sys.argv[1:]:
            sys.argv = [home, "--help"]
            try:
                importlib.import_module("flatlora_diffusion." + home).main()
            except SystemExit as stop:
                assert stop.code == 0
        print(*sys.modules.keys() & {"torch", "diffusers", "transformers", "peft", "accelerate", "gradio"})
    """
    alone = ("kohya", "captions")
    homes = (*alone, *(f"{name}.__main__" for name in COMMANDS if name not in alone))
    told = done(run(sys.executable, "-c", code, *homes, folder=PROJECT))
    assert told.count("usage: ") >= len(COMMANDS)
    assert told.endswith("\n\n"), told.splitlines()[-1]  # none of them
