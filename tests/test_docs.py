"""What the documents say of the code and of each other: files, names, links, flags."""

import ast
import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import flags_table
import pytest
import torch
import yaml

from flatlora_diffusion.adapter.command import main as kohya
from flatlora_diffusion.app.flags import parse_app_arguments
from flatlora_diffusion.config.command_line import WITHOUT_EFFECT, parse_train_config
from flatlora_diffusion.data.caption_command import main as captions
from flatlora_diffusion.evaluate.command import main as evaluate
from flatlora_diffusion.grid.command import main as grid
from flatlora_diffusion.sheet.command import main as sheet
from tests.tiny import build_unet, unet_inputs
from tests.train.test_drop_in import FIELDS, FLAGS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flatlora_diffusion"
ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"
DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/*/README.md")]
    if path.parent.name != "cards"
)

_CODE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_PATH = re.compile(r"(?:[\w.-]+/)+(?:[\w.-]+\.\w+)?|[\w-]+\.(?:py|md|toml|yaml)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def code_names(text):
    return {" ".join(code.split()) for code in _CODE.findall(_FENCE.sub("", text))}


def located(name):
    """The file or folder of a path that is inside the package, or begins at the repository's root."""
    return next((place for place in (PACKAGE / name, ROOT / name) if place.exists()), None)


@functools.cache
def names_of(file):
    """Qualified names of what a module defines: functions, classes, their members, variables."""
    found = set()

    def visit(node, prefix):
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            targets = getattr(child, "targets", [getattr(child, "target", None)])
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


def problem(code):
    """Why a name of the architecture doesn't exist, or None where it does or is no name of a file."""
    path, separator, name = code.partition("::")
    if not (separator or _PATH.fullmatch(path)):
        return None
    file = located(path)
    if file is None:
        return f"{path}: no such file"
    if separator and name not in names_of(file):
        return f"{path} has no {name}"
    return None


@pytest.mark.parametrize("document", ["docs/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_and_name_that_is_named_exists(document):
    named = code_names((ROOT / document).read_text(encoding="utf-8"))
    assert [p for p in map(problem, sorted(named)) if p] == []


def test_the_names_of_the_architecture_are_understood():
    assert len([name for name in code_names(ARCHITECTURE.read_text(encoding="utf-8")) if "::" in name]) > 50


@pytest.mark.parametrize(
    "code",
    [
        "flat/no_such_file.py",
        "flat/noise.py::no_such_name",
        "flat/layer.py::PerturbedLayer.missing",
        "no_such/",
    ],
)
def test_what_does_not_exist_is_found(code):
    assert problem(code)


def test_every_wing_and_its_layer_are_on_the_map():
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    text = ARCHITECTURE.read_text(encoding="utf-8")
    assert {wing for wing in wings if f"| `{wing}` |" in text} == wings
    picture = re.findall(r"^    [a-z].*", text, re.MULTILINE)
    layers = re.search(
        r"^layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    expected = [re.findall(r"\w+", layer) for layer in re.findall(r'"(.*?)"', layers[1])]
    drawn = [[word for word in line[:38].split() if word in wings] for line in picture]
    assert [line for line in drawn if line] == expected


def anchors(document):
    """The fragments under which GitHub shows the headings of a document."""
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    broken = []
    for link in _LINK.findall(text):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first_command = lines.index("```sh")
    assert not re.search(r"\d%", "\n".join(lines[:first_command]))  # statistics come later


def test_the_table_of_flags_is_that_of_the_settings():
    page = flags_table.PAGE.read_text(encoding="utf-8")
    assert flags_table.with_table(page) == page, "run python tools/flags_table.py"


def test_the_table_has_every_flag_once():
    rows = re.findall(r"^\| `--(?:no-)?(\w+)", flags_table.table(), re.MULTILINE)
    assert sorted(rows) == sorted({*FIELDS, *FLAGS, *WITHOUT_EFFECT})


def test_the_additions_to_the_diffusers_script_are_listed():
    text = flags_table.PAGE.read_text(encoding="utf-8")
    section = text.partition("These flags are additions:")[2].partition("\n## ")[0]
    assert set(re.findall(r"--(?:no-)?(\w+)", section)) == {*FIELDS, "config", "preset", "dry_run"} - set(
        FLAGS
    )


def commands():
    """The commands of the project in the documents: the name of each and its flags."""
    found = set()
    for document in DOCUMENTS:
        for block in _FENCE.findall(document.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines() if block.startswith("```sh") else ():
                command = re.search(rf"(?:{'|'.join(HELP)})(?= )", line)
                if command:
                    words = shlex.split(line[command.start() :], comments=True)
                    found.add((words[0], *(word for word in words if word.startswith("--"))))
    return sorted(found)


HELP = {
    "train_dreambooth_flat.py": parse_train_config,
    "app.py": parse_app_arguments,
    "flatlora-app": parse_app_arguments,
    "flatlora-grid": grid,
    "flatlora-sheet": sheet,
    "flatlora-evaluate": evaluate,
    "flatlora-kohya": kohya,
    "flatlora-captions": captions,
}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_in_the_documents_have_flags_that_exist(command, capsys):
    with pytest.raises(SystemExit) as stop:
        HELP[command[0]](["--help"])
    assert stop.value.code == 0
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(command[1:]) <= known


def test_the_loop_of_the_readme_trains_a_lora():
    """Its lines as they stand; of a user's own are only the loader, the loss and the optimizer."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    setup, mark, training = loop.partition("for batch in loader:")
    unet = build_unet().train()
    processors = dict(unet.attn_processors)
    names = {
        "unet": unet.requires_grad_(False),
        "loader": [unet_inputs(seed) for seed in range(3)],
        "diffusion_loss": lambda unet, batch: unet(**batch).sample.square().mean(),
    }
    exec(setup, names)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    names["optimizer"] = torch.optim.SGD(trained, lr=1.0)
    exec(mark + training, names)
    assert names["flat"].global_step == 3
    assert any(not torch.equal(one, other) for one, other in zip(before, trained, strict=True))
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())


@pytest.mark.slow
def test_the_hooks_of_pre_commit_pass(tmp_path):
    """Nothing is fetched: they are the commands beside this Python."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The types take half a minute; that they are checked, the next test tells.
    environment = {**os.environ, "PATH": path, "PRE_COMMIT_HOME": str(tmp_path), "SKIP": "types"}
    run = subprocess.run(
        [sys.executable, "-m", "pre_commit", "run", "--all-files"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("Passed") == 3


def test_what_quality_checks_is_checked_before_each_commit():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^quality:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
    (project,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    checked = [hook["entry"].split()[0] for hook in project["hooks"]]
    assert checked == re.findall(r"^\t\$\(BIN\)/(\S+)", recipe, re.MULTILINE)
