"""The example of a Hugging Face Space: what it starts, and that its versions are those that were tested."""

import re
import runpy
import shutil
import tomllib

import yaml

from flatlora_diffusion.app import serve
from flatlora_diffusion.app.serve import PROJECT

SPACE = PROJECT / "docs" / "space"
CONSTRAINTS = (PROJECT / "constraints.txt").read_text().splitlines()


def names(requirements):
    return {re.split(r"[<>=]", line)[0].lower().replace("_", "-") for line in requirements}


def test_its_versions_are_those_that_were_tested():
    needed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = (SPACE / "requirements.txt").read_text().splitlines()
    assert set(required) <= set(CONSTRAINTS) and names(required) == names(needed)
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio" and f"gradio=={header['sdk_version']}" in CONSTRAINTS
    assert (SPACE / header["app_file"]).is_file()


def test_it_serves_the_run_beside_it_where_a_space_asks(tmp_path, monkeypatch):
    shutil.copy(SPACE / "app.py", tmp_path)
    started = []
    monkeypatch.setattr(serve, "serve", started.append)
    for base in (None, tmp_path / "base"):
        if base:
            base.mkdir()
        monkeypatch.setattr("sys.exit", lambda code: started.append(code))
        runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
        given, code = started[-2:]
        assert (given.host, given.port, code) == ("0.0.0.0", 7860, 0)
        assert given.run == [tmp_path / "run"] and given.base == (base and str(base))
