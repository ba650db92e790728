"""Bad input, as a user gives it: exit code 2, one line that names the culprit, nothing written."""

import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from flatlora_diffusion.adapter.command import main as convert
from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.common.command import run_command
from flatlora_diffusion.config.command_line import parse_train_config
from flatlora_diffusion.grid.command import main as draw_grids
from flatlora_diffusion.output.checkpoint import OPTIMIZER_NAME, find_checkpoint
from flatlora_diffusion.sheet.command import main as lay_out
from flatlora_diffusion.train import afterwards, learner, validation
from flatlora_diffusion.train.arms import train

ROOT = Path(__file__).parents[2]
UNET_WEIGHTS = "base/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def separate_runs(monkeypatch):
    """Each run starts as in a process of its own, and leaves the settings of the process as they were."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    levels = {name: logging.getLogger(name).level for name in ("httpx", "accelerate")}
    # The two variables above count when the libraries are imported, which here was long ago.
    verbosities = {library: library.get_verbosity() for library in (diffusers_logging, transformers_logging)}
    for library in verbosities:
        library.set_verbosity_error()
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for library, verbosity in verbosities.items():
        library.set_verbosity(verbosity)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


MAINS = {"grid": draw_grids, "kohya": convert, "sheet": lay_out}


class World:
    """A folder with a base, icons, and room for an output folder, all of it free to be damaged."""

    def __init__(self, root, base_path, capfd, launcher):
        self.root, self.output, self._capfd, self.launcher = root, root / "out", capfd, launcher
        shutil.copytree(base_path, root / "base")

    def flags(self, *changes):
        """A complete command line; of a flag given twice the last one counts."""
        return [
            *("--pretrained_model_name_or_path", str(self.root / "base")),
            *("--instance_data_dir", str(self.root / "icons")),
            *("--instance_prompt", "an icon"),
            *("--output_dir", str(self.output)),
            *("--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "1"),
            *("--report_to", "none"),
            *self.words(*changes),
        ]

    def words(self, *words):
        return [str(word).replace("ROOT", str(self.root)) for word in words]

    def run(self, *changes):
        """Exit code and the lines on stderr of the training command, run in this process."""
        return self.run_words(*self.flags(*changes))

    def run_words(self, *words):
        """The same of the training command with these words alone, or of the command `-m MODULE`."""
        words = self.words(*words)

        def command():
            if words[:1] == ["-m"]:
                MAINS[words[1].rpartition(".")[2]](words[2:])
            else:
                train(parse_train_config(words))

        self._capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(command)
        return stop.value.code, lines_of(self._capfd.readouterr().err)

    def run_process(self, *words):
        """The same in a process of its own."""
        done = self.launcher.run(*self.words(*words))
        return done.code, lines_of(done.stderr)

    def train(self, *changes):
        """Let the script leave something that a later run meets."""
        code, lines = self.run(*changes)
        assert code == 0, lines

    def write(self, path, content):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    def cut(self, path):
        content = (self.root / path).read_bytes()
        self.write(path, content[: len(content) // 2])

    def empty(self, folder):
        shutil.rmtree(self.root / folder)
        (self.root / folder).mkdir()

    def edit_json(self, path, **changes):
        content = json.loads((self.root / path).read_text()) | changes
        self.write(path, json.dumps({key: value for key, value in content.items() if value != "remove"}))

    def pickle_weights(self, folder):
        for path in (self.root / folder).glob("*.safetensors"):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()

    def contents(self):
        """Every file and folder with a hash of what it holds."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder"
            for path in sorted(self.root.rglob("*"))
        }


def lines_of(stderr):
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.strip()]


@pytest.fixture
def world(tmp_path, icons, base_path, capfd, launcher):
    return World(tmp_path, base_path, capfd, launcher)


def the_error(code, lines):
    """The one line that a failed command prints last, after its exit code was checked."""
    assert code == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    assert not any("Traceback" in line for line in lines)
    return errors[0]


def assert_refused(world, run, fragment):
    before = world.contents()
    message = the_error(*run())
    assert fragment.replace("ROOT", str(world.root)) in message
    assert world.contents() == before, "nothing was written"


def test_these_settings_are_sound(world):
    """The twin of every test below: without the damage the command succeeds."""
    world.train()
    assert sorted(path.name for path in world.output.iterdir()) == ["README.md", WEIGHTS_NAME, "summary.json"]


ONE_PICTURE = ("--validation_inference_steps", 1, "--num_validation_images", 1)


def test_a_name_that_is_no_text_trains(world):
    """Its bytes go into the log, the record of the comparison and the tracker."""
    (world.root / "icons/green.png").rename(os.fsdecode(os.fsencode(world.root) + b"/icons/caf\xe9.png"))
    world.train("--compare", *ONE_PICTURE, "--report_to", "tensorboard")
    assert (world.output / "comparison.png").is_file()


LONG = " ".join(["a red icon"] * 40)


@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_captions_and_validation_prompts_that_are_cut_are_told_once(world, caplog, compare):
    world.write("icons/green.txt", LONG)
    code, lines = world.run("--validation_prompt", f"b {LONG}", *ONE_PICTURE, *compare)
    assert code == 0, lines
    told = [line for line in caplog.messages if "the text encoders read" in line]
    assert len(told) == 2
    assert told[0].startswith('"a red icon a red icon')
    assert told[1].startswith('"b a red icon')


def test_prompts_of_a_grid_that_are_cut_are_told_once(world, caplog):
    code, lines = world.run_words(
        *("-m", "flatlora_diffusion.grid", "--base", "ROOT/base", "--prompt", LONG, "a", "--seed", 1, 2),
        *("--resolution", 16, "--steps", 1, "--output", "ROOT/grid", "--negative_prompt", f"b {LONG}"),
    )
    assert code == 0, lines
    told = [line for line in caplog.messages if "the text encoders read" in line]
    assert [line[:4] for line in told] == ['"a r', '"b a']


def nothing(world):
    """The input files stay as they are."""


# Name -> what is done to the files, flags, what the error must say.
IMAGES = {
    "folder missing": (nothing, ["--instance_data_dir", "ROOT/nowhere"], "nowhere: no such folder"),
    "folder is a file": (nothing, ["--instance_data_dir", "ROOT/icons/red.png"], "red.png: not a folder"),
    "folder is empty": (lambda w: w.empty("icons"), [], "icons: no image in it"),
    "only junk": (
        lambda w: (w.empty("icons"), w.write("icons/.DS_Store", b"\0"), w.write("icons/notes.txt", "hi")),
        [],
        "icons: no image in it",
    ),
    "corrupt image": (lambda w: w.write("icons/broken.png", "junk"), [], "broken.png: cannot be read"),
    "empty image": (lambda w: w.write("icons/broken.jpg", ""), [], "broken.jpg: cannot be read"),
    "truncated image": (lambda w: w.cut("icons/green.png"), [], "green.png: cannot be read"),
    "image is a folder": (lambda w: (w.root / "icons/a.png").mkdir(), [], "a.png: cannot be read"),
    "metadata names a missing image": (
        lambda w: w.write("icons/metadata.jsonl", '{"file_name": "gone.png", "text": "a"}'),
        [],
        "metadata.jsonl, line 1: there is no image gone.png",
    ),
    "metadata is broken": (
        lambda w: w.write("icons/metadata.jsonl", '\n{"file_name": "red.png", "text": "a"}\n{"file_na'),
        [],
        "metadata.jsonl, line 3: must be",
    ),
    "metadata without text": (
        lambda w: w.write("icons/metadata.jsonl", '{"file_name": "red.png"}'),
        [],
        "metadata.jsonl, line 1: must be",
    ),
    "metadata not UTF-8": (
        lambda w: w.write("icons/metadata.jsonl", b'{"file_name": "red.png", "text": "\xff"}'),
        [],
        "metadata.jsonl: cannot be read as UTF-8",
    ),
    "caption not UTF-8": (
        lambda w: w.write("icons/green.txt", b"caf\xe9"),
        [],
        "green.txt: cannot be read as UTF-8",
    ),
    "name too long": (nothing, ["--instance_data_dir", "x" * 300], "x" * 300),
    "only pictures in folders below": (
        lambda w: shutil.move(w.root / "icons", w.root / "new/10_fox"),
        ["--instance_data_dir", "ROOT/new"],
        "no image in it; passed over: 10_fox/: 4 (sub-folder in kohya's layout, which --kohya_folders reads)",
    ),
    "table without text": (
        lambda w: w.write("icons/metadata.csv", "file_name,caption\nred.png,a\n"),
        [],
        "metadata.csv, line 2: must be of columns file_name and text (its columns: file_name, caption)",
    ),
    "integers of 32 bits": (
        lambda w: Image.new("I", (8, 8), 1 << 20).save(w.root / "icons/deep.tiff"),
        [],
        "deep.tiff: cannot be read as an image (32-bit integers",
    ),
    "floats beyond 1": (
        lambda w: Image.new("F", (8, 8), 200).save(w.root / "icons/deep.tiff"),
        [],
        "deep.tiff: cannot be read as an image (floats from 200 to 200",
    ),
}
PRIOR = ["--with_prior_preservation", "--class_prompt", "a picture", "--class_data_dir", "ROOT/class"]
CLASSES = {
    "class folder is a file": (lambda w: w.write("class", ""), PRIOR, "class: not a folder"),
    "class folder under a file": (
        nothing,
        [*PRIOR[:-1], "ROOT/icons/red.png/class"],
        "red.png is a file, not a folder",
    ),
    "corrupt class image": (lambda w: w.write("class/a.png", "junk"), PRIOR, "a.png: cannot be read"),
    "class images of a base that is damaged": (
        lambda w: w.cut(UNET_WEIGHTS),
        PRIOR,
        "base: unet: cannot be loaded",
    ),
    "held-out folder missing": (nothing, ["--heldout_data_dir", "ROOT/gone"], "gone: no such folder"),
    "held-out folder empty": (
        lambda w: (w.root / "held").mkdir(),
        ["--heldout_data_dir", "ROOT/held"],
        "--heldout_data_dir ROOT/held: no image in it",
    ),
}
BASES = {
    "base missing": (nothing, ["--pretrained_model_name_or_path", "ROOT/nowhere"], "nowhere: no such folder"),
    "relative base missing": (nothing, ["--pretrained_model_name_or_path", "./a/b"], "./a/b: no such folder"),
    "base is a single file": (
        nothing,
        ["--pretrained_model_name_or_path", f"ROOT/{UNET_WEIGHTS}"],
        "no SDXL base (it has ",
    ),
    "base of another kind": (
        lambda w: w.edit_json("base/model_index.json", _class_name="StableDiffusionPipeline"),
        [],
        "base: a StableDiffusionPipeline, not an SDXL pipeline",
    ),
    "no model_index": (lambda w: (w.root / "base/model_index.json").unlink(), [], "no model_index.json"),
    "model_index broken": (lambda w: w.cut("base/model_index.json"), [], "model_index.json: cannot be read"),
    "model_index empty": (
        lambda w: w.write("base/model_index.json", "[]"),
        [],
        "model_index.json: cannot be read",
    ),
    "model_index without scheduler": (
        lambda w: w.edit_json("base/model_index.json", scheduler="remove"),
        [],
        "scheduler",
    ),
    "model_index with unknown scheduler": (
        lambda w: w.edit_json("base/model_index.json", scheduler=["diffusers", "NewestScheduler"]),
        [],
        "NewestScheduler",
    ),
    "pickled unet": (
        lambda w: w.pickle_weights("base/unet"),
        [],
        "only pickled weights (.bin), which can run code in unet/",
    ),
    "pickled text encoder": (
        lambda w: w.pickle_weights("base/text_encoder_2"),
        [],
        "only pickled weights (.bin), which can run code in text_encoder_2/",
    ),
    "no vae weights": (lambda w: w.empty("base/vae"), [], "no weights in vae/"),
    "base of EDM": (
        lambda w: w.edit_json(
            "base/model_index.json", scheduler=["diffusers", "EDMDPMSolverMultistepScheduler"]
        ),
        [],
        "its scheduler is EDMDPMSolverMultistepScheduler, and EDM-style training isn't done",
    ),
    "no unet folder": (lambda w: shutil.rmtree(w.root / "base/unet"), [], "no weights in unet/"),
    "truncated unet": (lambda w: w.cut(UNET_WEIGHTS), [], "base: unet: cannot be loaded"),
    "truncated text encoder": (
        lambda w: w.cut("base/text_encoder/model.safetensors"),
        [],
        "base: text_encoder: cannot be loaded",
    ),
    "unet with the vae's weights": (
        lambda w: shutil.copy(w.root / "base/vae/diffusion_pytorch_model.safetensors", w.root / UNET_WEIGHTS),
        [],
        "base: unet: ",
    ),
    "text encoder without its weights": (
        lambda w: save_file({"x": torch.zeros(1)}, w.root / "base/text_encoder/model.safetensors"),
        [],
        "base: text_encoder: ",
    ),
    "unet configuration broken": (lambda w: w.cut("base/unet/config.json"), [], "base: unet: cannot be"),
    "no unet configuration": (lambda w: (w.root / "base/unet/config.json").unlink(), [], "base: unet: "),
    "no tokenizer": (lambda w: w.empty("base/tokenizer"), [], "tokenizer"),
    "tokenizer without its vocabulary": (
        lambda w: (w.root / "base/tokenizer/tokenizer.json").unlink(),
        [],
        "tokenizer",
    ),
    "base with too long a name": (
        nothing,
        ["--pretrained_model_name_or_path", "ROOT/" + "x" * 300],
        "x" * 300,
    ),
    "variant that isn't there": (nothing, ["--variant", "fp8"], "fp8"),
    "vae missing": (nothing, ["--pretrained_vae_model_name_or_path", "ROOT/gone"], "gone: cannot be loaded"),
    "vae is a unet": (nothing, ["--pretrained_vae_model_name_or_path", "ROOT/base/unet"], "base/unet: "),
}
FLAGS = {
    "rank 0": (nothing, ["--rank", 0], "--rank 0: must be greater than 0"),
    "negative rank": (nothing, ["--rank", -3], "--rank -3: must be greater than 0"),
    "rank in words": (nothing, ["--rank", "four"], "--rank: invalid int value: 'four'"),
    "negative sigma": (nothing, ["--flat_sigma", -0.1], "--flat_sigma -0.1: must be 0 or more"),
    "sigma nan": (nothing, ["--flat_sigma", "nan"], "--flat_sigma nan: must be a finite number"),
    "sigma inf": (nothing, ["--flat_sigma", "inf"], "--flat_sigma inf: must be a finite number"),
    "resolution 7": (nothing, ["--resolution", 7], "--resolution 7: must be 8 or more"),
    "resolution 0": (nothing, ["--resolution", 0], "--resolution 0: must be greater than 0"),
    "learning rate nan": (nothing, ["--learning_rate", "nan"], "--learning_rate nan: must be a finite"),
    "fp8": (nothing, ["--mixed_precision", "fp8"], "--mixed_precision fp8: not one of no, fp16, bf16"),
    "background": (nothing, ["--background", "purpleish"], "--background purpleish: not a colour"),
    "unknown flag": (nothing, ["--rnk", 4], "unknown argument --rnk; did you mean --rank?"),
    "compare without noise": (nothing, ["--compare", "--flat_sigma", 0], "--compare with --flat_sigma 0"),
    "folder that is no text": (nothing, ["--output_dir", "r\udce9"], "--output_dir 'r\\udce9': not text"),
    "prompt that is no text": (
        nothing,
        ["--validation_prompt", "a", "b\udce9"],
        "--validation_prompt 'b\\udce9': not text",
    ),
    "tracker that isn't installed": (
        nothing,
        ["--report_to", "comet_ml"],
        "--report_to comet_ml needs the package comet-ml: pip install comet-ml, or give none",
    ),
    "unknown tracker": (nothing, ["--report_to", "abacus"], "abacus"),
    "flag without its value": (nothing, ["--instance_prompt"], "--instance_prompt: expected one argument"),
    "EDM": (nothing, ["--do_edm_style_training"], "--do_edm_style_training: is for Playground v2.5"),
    "prior without its folder": (
        nothing,
        ["--with_prior_preservation", "--class_prompt", "a picture"],
        "--with_prior_preservation needs --class_data_dir",
    ),
    "seed of 65 bits": (nothing, ["--seed", 2**64], f"--seed {2**64}: must be at most"),
    "switch with another word": (nothing, ["--use_dora", "perhaps"], "--use_dora perhaps: the word after it"),
    "layer that isn't there": (
        nothing,
        ["--lora_layers", "to_q", "to_z"],
        "--lora_layers to_z: no linear or convolutional layer",
    ),
}
CONFIGS = {
    "config missing": (nothing, ["--config", "ROOT/gone.yaml"], "gone.yaml: no such file"),
    "config is a folder": (nothing, ["--config", "ROOT/icons"], "icons: is a directory"),
    "config is empty": (
        lambda w: w.write("c.yaml", ""),
        ["--config", "ROOT/c.yaml"],
        "c.yaml: must hold lines",
    ),
    "config is no YAML": (lambda w: w.write("c.yaml", "a: ["), ["--config", "ROOT/c.yaml"], "not YAML"),
    "config with an unknown key": (
        lambda w: w.write("c.yaml", "flat_sigam: 0.1"),
        ["--config", "ROOT/c.yaml"],
        "c.yaml: unknown setting flat_sigam; did you mean flat_sigma?",
    ),
    "config with a bad type": (
        lambda w: w.write("c.yaml", "rank: four"),
        ["--config", "ROOT/c.yaml"],
        "c.yaml: rank must be a whole number, not 'four'",
    ),
    "config out of range": (
        lambda w: w.write("c.yaml", "rank: 0"),
        ["--config", "ROOT/c.yaml"],
        "--rank 0: must be greater than 0",
    ),
}
OUTPUTS = {
    "output under a file": (
        nothing,
        ["--output_dir", "ROOT/icons/red.png/out"],
        "red.png is a file, not a folder",
    ),
    "output is a file": (
        nothing,
        ["--output_dir", "ROOT/icons/red.png"],
        "red.png is a file, not a folder",
    ),
    "output is a link to nowhere": (
        lambda w: w.output.symlink_to(w.root / "nowhere" / "at all"),
        [],
        "--output_dir",
    ),
    "output with too long a name": (nothing, ["--output_dir", "ROOT/" + "x" * 300], "x" * 300),
    "no such checkpoint": (
        nothing,
        ["--resume_from_checkpoint", "checkpoint-7"],
        "--resume_from_checkpoint checkpoint-7: not in",
    ),
    "no such checkpoint among others": (
        lambda w: (w.output / "checkpoint-3").mkdir(parents=True),
        ["--resume_from_checkpoint", "checkpoint-7"],
        "(there: checkpoint-3)",
    ),
    "no such checkpoint elsewhere": (
        lambda w: (w.output / "checkpoint-3").mkdir(parents=True),
        ["--resume_from_checkpoint", "ROOT/elsewhere/checkpoint-3"],
        "elsewhere/checkpoint-3: not in ROOT/elsewhere (there: none)",
    ),
    "only damaged checkpoints": (
        lambda w: (w.output / "checkpoint-3").mkdir(parents=True),
        ["--resume_from_checkpoint", "latest"],
        "no checkpoint is sound",
    ),
    "checkpoint cut short": (
        lambda w: (w.train("--checkpointing_steps", 1), w.cut("out/checkpoint-1/state.json")),
        ["--resume_from_checkpoint", "checkpoint-1"],
        "no checkpoint is sound",
    ),
    "checkpoint of another rank": (
        lambda w: w.train("--checkpointing_steps", 1, "--rank", 2),
        ["--resume_from_checkpoint", "latest"],
        "checkpoint-1 belongs to other settings (lora_alpha 2 then and 4 now, rank 2 then and 4 now)",
    ),
    "checkpoint of other images": (
        lambda w: (w.train("--checkpointing_steps", 1), (w.root / "icons/green.png").unlink()),
        ["--resume_from_checkpoint", "latest"],
        "checkpoint-1 belongs to other settings (images and captions",
    ),
}


def adapter_file(world, content):
    save_file(content, world.root / "a.safetensors")


KOHYA = ["-m", "flatlora_diffusion.kohya"]
GENERATE = [
    *("-m", "flatlora_diffusion.grid", "--base", "ROOT/base", "--output", "ROOT/out"),
    *("--resolution", 16, "--steps", 1, "--device", "cpu", "--prompt", "a"),
]
TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
# The same for other commands, and adapters for input.
TOOLS = {
    "adapter missing": (nothing, [*GENERATE, "--adapter", "x=ROOT/gone"], "gone: not a sound safetensors"),
    "adapter damaged": (
        lambda w: w.write("a.safetensors", "junk"),
        [*GENERATE, "--adapter", "x=ROOT/a.safetensors"],
        "a.safetensors: not a sound safetensors file",
    ),
    "adapter of another base": (
        lambda w: adapter_file(
            w, {f"{TO_Q}.lora_{m}.weight": torch.zeros(s) for m, s in (("A", (4, 9)), ("B", (9, 4)))}
        ),
        [*GENERATE, "--adapter", "x=ROOT/a.safetensors"],
        "a.safetensors: doesn't fit this base",
    ),
    "adapter that is none": (
        lambda w: adapter_file(w, {"conv_in.weight": torch.zeros(1)}),
        [*GENERATE, "--adapter", "x=ROOT/a.safetensors"],
        "a.safetensors: conv_in.weight, 1 of 1 such keys, is no LoRA weight of SDXL",
    ),
    "adapter without a name": (nothing, [*GENERATE, "--adapter", "x"], "--adapter: x: must be NAME=PATH"),
    "adapter called base": (nothing, [*GENERATE, "--adapter", "base=x"], "method base: is there twice"),
    "adapters of one name": (
        nothing,
        [*GENERATE, "--adapter", "x=a", "--adapter", "x=b"],
        "--adapter x=b: x is a already; give it another name",
    ),
    "pictures from no base": (nothing, [*GENERATE, "--base", "ROOT/gone"], "gone: no such folder"),
    "pictures of no size": (nothing, [*GENERATE, "--resolution", 0], "width 0: must be a multiple"),
    "pictures in no steps": (nothing, [*GENERATE, "--steps", 0], "steps 0: must be greater than 0"),
    "pictures with no guidance": (nothing, [*GENERATE, "--guidance", "nan"], "guidance nan: must be"),
    "pictures of no seed": (nothing, [*GENERATE, "--seed", -1], "seed -1: must be 0 or more"),
    "pictures on no device": (nothing, [*GENERATE, "--device", "abacus"], "--device abacus: "),
    "pictures into a file": (
        nothing,
        [*GENERATE, "--output", "ROOT/icons/red.png"],
        "red.png is a file, not a folder",
    ),
    "conversion of nothing": (nothing, [*KOHYA, "ROOT/gone.safetensors", "ROOT/b.safetensors"], "gone.safe"),
    "conversion of damage": (
        lambda w: w.write("a.safetensors", "junk"),
        [*KOHYA, "ROOT/a.safetensors", "ROOT/b.safetensors"],
        "a.safetensors: not a sound safetensors file",
    ),
    "conversion of no adapter": (
        lambda w: adapter_file(w, {"conv_in.weight": torch.zeros(1)}),
        [*KOHYA, "ROOT/a.safetensors", "ROOT/b.safetensors"],
        "conv_in.weight, 1 of 1 such keys, is no LoRA weight of SDXL",
    ),
    "conversion onto another file": (
        lambda w: adapter_file(w, {f"{TO_Q}.lora_A.weight": torch.zeros(4, 9)}),
        [*KOHYA, "ROOT/a.safetensors", f"ROOT/{UNET_WEIGHTS}"],
        "diffusion_pytorch_model.safetensors: exists; name another file",
    ),
    "sheet of nothing": (
        nothing,
        ["-m", "flatlora_diffusion.sheet", "ROOT/gone", "--columns", "a", "--output", "ROOT/sheet.png"],
        "ROOT/gone: cannot be read as an image (No such file",
    ),
}
for suffix in (".bin", ".pt", ".ckpt"):
    pickled = functools.partial(
        lambda suffix, w: torch.save({"a": torch.zeros(1)}, w.root / f"a{suffix}"), suffix
    )
    TOOLS[f"adapter pickled as {suffix}"] = (
        pickled,
        [*GENERATE, "--adapter", f"x=ROOT/a{suffix}"],
        f"a{suffix}: must be a .safetensors file; a pickled one could run code",
    )
    TOOLS[f"conversion of a pickled {suffix}"] = (
        pickled,
        [*KOHYA, f"ROOT/a{suffix}", "ROOT/b.safetensors"],
        f"a{suffix}: must be a .safetensors file; a pickled one could run code",
    )
INCOMPLETE = {
    "nothing given": (nothing, [], "missing: --pretrained_model_name_or_path, --instance_prompt"),
    "no prompt given": (
        nothing,
        ["--pretrained_model_name_or_path", "ROOT/base", "--instance_data_dir", "ROOT/icons"],
        "missing: --instance_prompt",
    ),
}


@pytest.mark.parametrize(
    ("damage", "flags", "fragment"),
    [
        pytest.param(*case, id=name)
        for name, case in (IMAGES | CLASSES | BASES | FLAGS | CONFIGS | OUTPUTS).items()
    ],
)
def test_bad_input_to_the_trainer(world, damage, flags, fragment):
    damage(world)
    assert_refused(world, lambda: world.run(*flags), fragment)


@pytest.mark.parametrize(
    ("damage", "words", "fragment"),
    [pytest.param(*case, id=name) for name, case in (TOOLS | INCOMPLETE).items()],
)
def test_bad_input_to_another_command(world, damage, words, fragment):
    damage(world)
    assert_refused(world, lambda: world.run_words(*words), fragment)


@pytest.mark.parametrize(
    "case",
    ["nothing given", "adapter missing", "conversion of nothing", "sheet of nothing"],
)
def test_a_process_ends_alike(world, case):
    """Its exit code and its stderr are those that the tests above see from within."""
    damage, words, fragment = (TOOLS | INCOMPLETE)[case]
    damage(world)
    assert_refused(world, lambda: world.run_process(*words), fragment)


@pytest.mark.parametrize(
    ("package", "flags"),
    [("bitsandbytes", ["--use_8bit_adam"]), ("prodigyopt", ["--optimizer", "prodigy"])],
)
def test_a_package_that_is_not_installed(world, monkeypatch, package, flags):
    monkeypatch.setitem(sys.modules, package, None)  # imports of it fail
    assert_refused(
        world, lambda: world.run(*flags), f"{' '.join(flags)} needs the package {package}: pip install"
    )


def test_what_an_earlier_run_left_stays(world):
    world.output.mkdir()
    save_file({"unet": torch.zeros(1)}, world.output / WEIGHTS_NAME)
    world.cut(UNET_WEIGHTS)
    assert_refused(world, world.run, "base: unet: cannot be loaded")


@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "latest"]], ids=["again", "resumed"])
def test_a_damaged_adapter_of_an_earlier_run_is_replaced(world, resume):
    world.write(f"out/{WEIGHTS_NAME}", b"damaged")
    world.train(*resume)
    assert load_file(world.output / WEIGHTS_NAME)


def test_the_command_as_users_type_it(world):
    """With nothing imported before: the log says what is to be trained, then comes the error, and alone."""
    world.cut(UNET_WEIGHTS)
    before = world.contents()
    command = [sys.executable, "train_dreambooth_flat.py", *world.flags()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert "base: unet: cannot be loaded" in the_error(done.returncode, lines)
    assert len(lines) == 3 and "4 images, 2 with captions" in lines[0], lines
    assert world.contents() == before


def test_a_compared_run_refuses_alike(world):
    world.cut(UNET_WEIGHTS)
    assert_refused(world, lambda: world.run("--compare"), "base: unet: cannot be loaded")


# Disks.


@pytest.fixture
def mount(tmp_path):
    """Mount a file system in memory with some options at `tmp_path/disk`, or skip the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = []

    def mount_with(options):
        if not sys.platform.startswith("linux") or not shutil.which("mount"):
            pytest.skip("there is no mount here")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            pytest.skip(f"cannot mount: {result.stderr.strip()}")
        done.append(folder)
        return folder

    yield mount_with
    for mounted in done:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize("name", ["disk", "disk/out", "disk/out/deeper"])
def test_an_output_folder_on_a_disk_that_is_read_only(world, mount, name):
    mount("ro,size=64k")
    assert_refused(
        world,
        lambda: world.run("--output_dir", f"ROOT/{name}"),
        "disk cannot be written to; give another folder",
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_output_folder_without_permission(world):
    world.output.mkdir()
    world.output.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert_refused(world, world.run, "out cannot be written to; give another folder")


FULL = ["--checkpointing_steps", 1, "--max_train_steps", 60, "--output_dir", "ROOT/disk"]


def test_a_disk_that_fills_up_in_training(world, mount):
    disk = mount("size=1m")
    message = the_error(*world.run(*FULL))
    left = sorted(disk.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in left)
    assert steps == list(range(1, len(left) + 1))
    assert len(left) >= 2, "some must fit"
    assert (
        f"checkpoint-{steps[-1] + 1}: the checkpoint cannot be written (No space left on device)" in message
    )
    for step in steps:
        assert_sound(disk / f"checkpoint-{step}", step)


def test_a_disk_that_fills_up_under_the_tracker(world, mount):
    """TensorBoard writes to the same disk, and in a thread of its own."""
    pytest.importorskip("tensorboard")
    disk = mount("size=1m")
    message = the_error(*world.run(*FULL, "--report_to", "tensorboard"))
    assert "No space left on device" in message
    steps = sorted(int(path.name.removeprefix("checkpoint-")) for path in disk.glob("checkpoint-*"))
    assert len(steps) >= 2
    for step in steps:
        assert_sound(disk / f"checkpoint-{step}", step)


def test_a_disk_with_no_room_for_the_adapter(world, mount):
    disk = mount("size=8k")
    message = the_error(*world.run("--output_dir", "ROOT/disk"))
    assert f"{WEIGHTS_NAME}: cannot be written (No space left on device)" in message
    assert list(disk.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "flags"),
    [
        (afterwards, "draw_grid", ["--compare"]),
        (
            validation,
            "report_validation",
            ["--validation_prompt", "a fox", "--max_train_steps", 2],
        ),
    ],
    ids=["comparison", "validation"],
)
def test_a_disk_with_no_room_for_the_pictures(world, mount, monkeypatch, module, function, flags):
    disk, original = mount("size=2m"), getattr(module, function)

    def fill_up_and_go_on(*arguments, **settings):
        with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        return original(*arguments, **settings)

    monkeypatch.setattr(module, function, fill_up_and_go_on)
    quick = [*ONE_PICTURE, "--checkpointing_steps", 1]
    message = the_error(*world.run("--output_dir", "ROOT/disk", *quick, *flags))
    assert "No space left on device" in message
    for folder in (
        (disk / "lora", disk / "flat_lora") if function == "draw_grid" else (disk / "checkpoint-2",)
    ):
        assert load_file(folder / WEIGHTS_NAME), "what was trained is there"


def assert_sound(folder, step):
    settings = json.loads((folder / "state.json").read_text())["settings"]
    stored = find_checkpoint(folder.parent, folder.name, settings)
    assert (stored.folder, stored.step) == (folder, step)
    for tensors in (stored.tensors(WEIGHTS_NAME), stored.tensors(OPTIMIZER_NAME)):
        assert tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())


# Training that diverges.


def test_a_learning_rate_that_is_far_too_high(world):
    message = the_error(*world.run("--learning_rate", 1e30, "--max_train_steps", 9))
    assert "the loss became" in message
    assert "at step 2 " in message
    assert "no checkpoint had been written" in message
    assert "--learning_rate" in message
    assert not (world.output / WEIGHTS_NAME).exists()


def test_a_learning_rate_that_no_float_holds(world):
    assert_refused(world, lambda: world.run("--learning_rate", 1e300), "--learning_rate 1e+300: must be")


def test_a_base_with_a_nan_in_it(world):
    weights = load_file(world.root / UNET_WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, world.root / UNET_WEIGHTS, metadata={"format": "pt"})
    message = the_error(*world.run("--max_train_steps", 3))
    assert "the loss became nan at step 1 " in message
    assert not (world.output / WEIGHTS_NAME).exists()


def diverging(monkeypatch, at_call, spoil):
    """From one call on, the loss is spoilt."""
    calls, original = itertools.count(1), learner.diffusion_losses

    def diffusion_losses(*arguments):
        loss = original(*arguments)
        return spoil(loss) if next(calls) >= at_call else loss

    monkeypatch.setattr(learner, "diffusion_losses", diffusion_losses)


@pytest.mark.slow
def test_a_loss_that_diverges_late_leaves_the_checkpoint(world, monkeypatch):
    diverging(monkeypatch, 4, lambda loss: loss * float("inf"))
    flags = ["--max_train_steps", 4, "--checkpointing_steps", 2]
    message = the_error(*world.run(*flags))
    assert "the loss became inf at step 4 and nothing was updated with it" in message
    assert f"{world.output / 'checkpoint-2'} is sound" in message
    assert [path.name for path in world.output.iterdir()] == ["checkpoint-2"]
    assert_sound(world.output / "checkpoint-2", 2)
    monkeypatch.undo()
    code, _ = world.run(*flags, "--resume_from_checkpoint", "latest")
    assert code == 0
    assert all(tensor.isfinite().all() for tensor in load_file(world.output / WEIGHTS_NAME).values())


@pytest.mark.parametrize(("at", "last"), [(3, 5), (5, 5)], ids=["before the end", "in the last step"])
def test_gradients_that_diverge_under_a_finite_loss(world, monkeypatch, at, last):
    """Such a step turns every parameter into NaN; no file may hold that."""

    def spoil(loss):
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    diverging(monkeypatch, at, spoil)
    message = the_error(*world.run("--max_train_steps", last, "--checkpointing_steps", 1))
    assert f"at step {at} " in message
    assert sorted(path.name for path in world.output.iterdir()) == [
        f"checkpoint-{step}" for step in range(1, at)
    ]
    for step in range(1, at):
        assert_sound(world.output / f"checkpoint-{step}", step)


def test_the_error_of_a_diverged_run_survives_strange_neighbours(world, monkeypatch):
    for name in ("checkpoint-old", "checkpoint-12.zip"):
        world.write(f"out/{name}", "mine")
    diverging(monkeypatch, 1, lambda loss: loss * float("nan"))
    message = the_error(*world.run())
    assert "the loss became nan at step 1 " in message
    assert "no checkpoint had been written" in message
