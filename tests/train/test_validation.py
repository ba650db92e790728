"""Validation during training: what is drawn, where it goes, and that nothing of it changes or stops a run."""

import contextlib
import dataclasses
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flatlora_diffusion.adapter.file import WEIGHTS_NAME
from flatlora_diffusion.draw.adapters import load_adapter
from flatlora_diffusion.draw.decoding import decoding_dtype
from flatlora_diffusion.draw.pipeline import Drawing, draw_with, load_pipeline
from flatlora_diffusion.output.gallery import Gallery, SideBySide
from flatlora_diffusion.output.names import step_name
from flatlora_diffusion.sdxl.base import load_base
from flatlora_diffusion.sheet import layout
from flatlora_diffusion.sheet.files import Sheet
from flatlora_diffusion.train import afterwards
from flatlora_diffusion.train import validation as train_validation
from flatlora_diffusion.train.arms import train
from flatlora_diffusion.train.validation import Validation, report_validation
from tests.tiny import assert_equal, run

PROMPTS = ("a red icon", "a blue icon, far away")
STEPS = (2, 4)


@pytest.fixture
def validated(config):
    """A run of two epochs that validates after both, with noise that would show."""
    return dataclasses.replace(
        config,
        flat_sigma=0.5,
        flat_schedule="constant",
        max_train_steps=4,
        validation_prompt=PROMPTS,
        num_validation_images=2,
        validation_inference_steps=1,
        validation_epochs=1,
        checkpointing_steps=2,
    )


@pytest.fixture
def compared(validated):
    return dataclasses.replace(validated, compare=True, num_validation_images=1)


@pytest.fixture(autouse=True)
def without_final_comparison(monkeypatch):
    """What is drawn after training is not the subject here."""
    for name in ("draw_grid", "comparison_exhibit"):
        monkeypatch.setattr(afterwards, name, lambda *arguments, **settings: None)


_finished: dict[bool, Path] = {}


@pytest.fixture
def undisturbed(validated, compared, tmp_path_factory):
    """The output folder of a run, or of a comparison, that nothing disturbed; each is done once."""

    def output(compare: bool = False) -> Path:
        if compare not in _finished:
            _finished[compare] = tmp_path_factory.mktemp("undisturbed") / "out"
            chosen = compared if compare else validated
            train(dataclasses.replace(chosen, output_dir=str(_finished[compare])))
        return _finished[compare]

    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every picture of validation below a folder, and every manifest."""
    files = [file for file in folder.rglob("*") if file.suffix == ".png" or file.name == "manifest.json"]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}


def pictures(count: int, size: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (10 * index, 90, 200)) for index in range(count)]


# One run.


@pytest.mark.slow
def test_every_validation_leaves_pictures_and_a_labelled_sheet(validated, monkeypatch):
    written, original = [], layout.Text

    def text(words, *arguments):
        written.append(words)
        return original(words, *arguments)

    monkeypatch.setattr(layout, "Text", text)
    train(validated)
    folder = Path(validated.output_dir, "validation")
    names = [f"{prompt:03d}-seed{seed}.png" for prompt in (0, 1) for seed in (3, 4)]
    for step in STEPS:
        sheet = Sheet.load(folder / f"step-{step:06d}")
        assert sheet.title == f"Flat-LoRA after step {step}"
        assert list(sheet.columns) == ["seed 3", "seed 4"]
        assert [row.label for row in sheet.rows] == list(PROMPTS)
        assert [image.name for row in sheet.rows for image in row.images] == names
        assert "tiny-sdxl, 4 training images, rank 4, " in sheet.footer
        assert "Flat-LoRA sigma 0.5 (constant); 1 denoising steps, guidance 5" in sheet.footer
        assert Image.open(folder / f"step-{step:06d}.png").tobytes() == sheet.draw().tobytes()
        assert {sheet.title, sheet.footer} <= set(written)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step-000002", "step-000002.png", "step-000004", "step-000004.png"),
    ]


@pytest.mark.slow
def test_the_pictures_are_those_that_anybody_draws_with_the_saved_adapter(undisturbed, base_path):
    """After the last step, so without the noise and in the order of prompts and seeds."""
    pipeline = load_pipeline(str(base_path))
    load_adapter(pipeline, "mine", undisturbed())
    drawn = undisturbed() / "validation" / "step-000004"
    for number, prompt in enumerate(PROMPTS):
        for seed in (3, 4):
            expected = draw_with(pipeline, "mine", prompt, seed, Drawing(16, 16, 1, 5.0, sampler="DPM++ 2M"))
            actual = Image.open(drawn / f"{number:03d}-seed{seed}.png")
            differences = [abs(a - b) for a, b in zip(actual.tobytes(), expected.tobytes(), strict=True)]
            assert max(differences) <= 1


@pytest.mark.slow
def test_validation_changes_nothing_of_the_adapter(validated, undisturbed):
    silent = run(validated, validation_epochs=0, validation_prompt=None)
    assert_equal(load_file(undisturbed() / WEIGHTS_NAME), silent)


@pytest.mark.slow
def test_what_an_interruption_prevented_is_drawn_on_resuming(validated, undisturbed, monkeypatch):
    """The kill comes after the checkpoint and before the pictures of the same step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_validation, "draw_validation", interrupt)
        train(validated)
    output = Path(validated.output_dir)
    assert not (output / "validation").exists()
    train(dataclasses.replace(validated, resume_from_checkpoint="latest"))
    expected = contents(undisturbed())
    assert contents(output) == expected
    assert len(expected) == 2 * 6
    assert (output / WEIGHTS_NAME).read_bytes() == (undisturbed() / WEIGHTS_NAME).read_bytes()


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_running_out_of_memory_costs_the_pictures_alone(validated, undisturbed, monkeypatch, caplog):
    original, calls = train_validation.draw, []

    def draw(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 2:  # in the middle of the first validation
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments, **settings)

    monkeypatch.setattr(train_validation, "draw", draw)
    assert_equal(run(validated), load_file(undisturbed() / WEIGHTS_NAME))
    folder = Path(validated.output_dir, "validation")
    assert sorted(path.name for path in folder.glob("*.png")) == ["step-000004.png"]
    (line,) = [line for line in caplog.messages if line.startswith("out of memory")]
    assert "training goes on; --validation_epochs 0 draws after training only" in line


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_stands_half_precision_draws_in_it(validated, base_path, monkeypatch, upcast):
    """It takes half the room beside the UNet."""
    base = load_base(str(base_path), dtype=torch.bfloat16)
    base.vae.register_to_config(force_upcast=upcast)
    found = []
    monkeypatch.setattr(
        train_validation, "draw", lambda pipeline, *_, **__: found.append(decoding_dtype(pipeline.vae))
    )
    learner = SimpleNamespace(
        base=base,
        prompts=None,
        accelerator=SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext),
        learning={"unet": base.unet},
        in_tokens=str,
    )
    train_validation.draw_validation(learner, validated)
    assert set(found) == {torch.float32 if upcast else torch.bfloat16}
    assert base.vae.device.type == "cpu"


def test_fewer_prompts_leave_no_picture_of_the_others(validated, tmp_path):
    for prompts in (PROMPTS, PROMPTS[:1]):
        fewer = dataclasses.replace(validated, validation_prompt=prompts)
        Gallery(tmp_path / "out", fewer, "no", 4).write(pictures(2 * len(prompts)), "step-000002", "title")
    assert [p.name for p in sorted(tmp_path.glob("out/*/*.png"))] == ["000-seed3.png", "000-seed4.png"]


def test_a_sheet_that_would_be_too_large_leaves_the_pictures(validated, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(layout, "MAX_PIXELS", 1000)
    gallery = Gallery(tmp_path / "out", validated, "no", 4)
    gallery.write(pictures(4), "step-000002", "title")
    assert len(contents(gallery.folder)) == 5
    assert gallery.has("step-000002")
    assert "more than the limit" in caplog.text
    SideBySide(tmp_path / "both", {"LoRA": gallery.folder, "Flat-LoRA": gallery.folder}).draw(2)
    assert "no sheet of step 2 side by side" in caplog.text
    assert not [*gallery.folder.glob("*.png"), *(tmp_path / "both").glob("*.png")]


@pytest.mark.parametrize(
    "change",
    [
        {"validation_prompt": ("another icon", PROMPTS[1])},
        {"seed": 4},
        {"validation_resolution": 24},
        {"validation_inference_steps": 2},
        {"validation_guidance_scale": 4.0},
        {"pretrained_model_name_or_path": "another"},
        {"pretrained_vae_model_name_or_path": "another"},
        {"num_validation_images": 1},
    ],
)
def test_other_settings_ask_for_other_pictures(validated, tmp_path, change):
    gallery = Gallery(tmp_path, validated, "no", 4)
    assert not gallery.has("step-000002")
    gallery.write(pictures(4), "step-000002", "title")
    assert gallery.has("step-000002")
    assert not gallery.has("step-000004")
    assert not Gallery(tmp_path, validated, "bf16", 4).has("step-000002")
    assert not Gallery(tmp_path, dataclasses.replace(validated, **change), "no", 4).has("step-000002")


# Trackers.


class Tracker:
    """Notes what it is given, as an accelerate tracker would be."""

    def __init__(self, name):
        self.name = name
        self.logged = []

    def log(self, values, step=None, **settings):
        self.logged.append((values, step, settings))

    log_images = log


def test_wandb_gets_the_pictures_with_captions(validated, tmp_path, monkeypatch):
    """wandb's `Image(picture, caption=...)`, as the diffusers script calls it."""
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(Image=lambda picture, caption: (picture, caption))
    )
    tracker, drawn = Tracker("wandb"), pictures(4)
    report_validation(drawn, 4, Gallery(tmp_path, validated, "no", 4), validated, [tracker], 1)
    captions = [f"{prompt} (seed {seed})" for prompt in PROMPTS for seed in (3, 4)]
    assert tracker.logged == [({"validation": list(zip(drawn, captions, strict=True))}, None, {})]


def test_tensorboard_gets_the_pictures_by_epoch(validated, tmp_path):
    tracker, drawn = Tracker("tensorboard"), pictures(4)
    report_validation(drawn, 4, Gallery(tmp_path, validated, "no", 4), validated, [tracker], 1)
    ((values, step, settings),) = tracker.logged
    assert (values["validation"].shape, step, settings) == ((4, 16, 16, 3), 1, {"dataformats": "NHWC"})
    assert [bytes(picture.data) for picture in values["validation"]] == [p.tobytes() for p in drawn]


# A comparison.


@pytest.mark.slow
def test_a_comparison_shows_the_base_and_both_arms_side_by_side(undisturbed, base_path):
    output = undisturbed(compare=True)
    pipeline = load_pipeline(str(base_path))
    for number, prompt in enumerate(PROMPTS):
        expected = draw_with(pipeline, None, prompt, 3, Drawing(16, 16, 1, 5.0, sampler="DPM++ 2M"))
        drawn = Image.open(output / "validation" / "base" / f"{number:03d}-seed3.png")
        assert drawn.tobytes() == expected.tobytes()
    assert Sheet.load(output / "validation" / "base").footer == "tiny-sdxl; 1 denoising steps, guidance 5"
    for step in STEPS:
        name = f"step-{step:06d}"
        columns = {
            "base": output / "validation" / "base",
            "LoRA": output / "lora" / "validation" / name,
            "Flat-LoRA": output / "flat_lora" / "validation" / name,
        }
        cells = [
            [Image.open(folder / f"{number:03d}-seed3.png") for folder in columns.values()]
            for number in (0, 1)
        ]
        assert len({cell.tobytes() for cell in cells[0]}) == 3
        expected = layout.contact_sheet(
            cells,
            columns=list(columns),
            rows=[f"{prompt}\nseed 3" for prompt in PROMPTS],
            title=f"After step {step}; in each row: the same prompt, seed and initial noise",
            footer=Sheet.load(columns["Flat-LoRA"]).footer,
        )
        assert Image.open(output / "validation" / f"{name}.png").tobytes() == expected.tobytes()
    alone = (undisturbed() / WEIGHTS_NAME).read_bytes()
    assert (output / "flat_lora" / WEIGHTS_NAME).read_bytes() == alone, "drawing the base changed the arm"


@pytest.mark.slow
@pytest.mark.parametrize("killed", [Gallery, SideBySide], ids=["before the pictures", "before the sheet"])
def test_an_interrupted_comparison_ends_with_the_same_pictures(compared, undisturbed, monkeypatch, killed):
    """Killed in the second arm, after the last validation step's checkpoint."""
    expected, output = contents(undisturbed(compare=True)), Path(compared.output_dir)
    shutil.copytree(undisturbed(compare=True), output, ignore=shutil.ignore_patterns("flat_lora"))
    for sheet in output.glob("validation/step-*.png"):
        sheet.unlink()
    name = "write" if killed is Gallery else "draw"
    original = getattr(killed, name)

    def kill(self, *arguments):
        if step_name(STEPS[-1]) in arguments or STEPS[-1] in arguments:
            raise KeyboardInterrupt
        return original(self, *arguments)

    resumed = dataclasses.replace(compared, resume_from_checkpoint="latest")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(killed, name, kill)
        train(resumed)
    assert (output / "validation" / "step-000002.png").is_file()
    assert not (output / "validation" / "step-000004.png").exists()
    train(resumed)
    assert contents(output) == expected


def test_a_sheet_waits_for_the_last_arm(compared, monkeypatch):
    """The second arm's pictures may be those of an earlier run as long as the first one trains."""
    shown, folders = [], {name: Path(compared.output_dir, name) for name in ("lora", "flat_lora")}
    arms = [
        dataclasses.replace(compared, compare=False, output_dir=str(folder)) for folder in folders.values()
    ]
    galleries = {name: folder / "validation" for name, folder in folders.items()}
    monkeypatch.setattr(train_validation, "draw_validation", lambda *arguments: pictures(2))
    monkeypatch.setattr(SideBySide, "draw", lambda self, step: shown.append(step))
    accelerator = SimpleNamespace(
        mixed_precision="no", trackers=[], is_main_process=True, wait_for_everyone=lambda: None
    )
    for arm, step in zip(arms, STEPS, strict=True):
        validation = Validation(
            SimpleNamespace(accelerator=accelerator),
            SimpleNamespace(averaged=contextlib.nullcontext),
            arm,
            folder=Path(arm.output_dir, "validation"),
            images=4,
            steps_an_epoch=STEPS[0],
            total_steps=STEPS[1],
            side_by_side=SideBySide(Path(compared.output_dir, "validation"), galleries),
        )
        validation.after(step)
    assert shown == [STEPS[1]]


def test_nothing_is_shown_side_by_side_that_was_drawn_otherwise(validated, tmp_path):
    arms = {"LoRA": tmp_path / "lora", "Flat-LoRA": tmp_path / "flat_lora"}
    side_by_side = SideBySide(tmp_path / "both", arms)
    side_by_side.draw(2)
    Gallery(arms["LoRA"], validated, "no", 4).write(pictures(4), "step-000002", "LoRA")
    side_by_side.draw(2)
    finer = dataclasses.replace(validated, validation_inference_steps=9)
    Gallery(arms["Flat-LoRA"], finer, "no", 4).write(pictures(4), "step-000002", "Flat-LoRA")
    side_by_side.draw(2)
    assert not (tmp_path / "both").exists()
    Gallery(arms["Flat-LoRA"], validated, "no", 4).write(pictures(4), "step-000002", "Flat-LoRA")
    Gallery(tmp_path / "both", finer, "no", 4).write(pictures(4), "base", "The base")
    side_by_side.draw_missing()
    with_two_columns = Image.open(tmp_path / "both" / "step-000002.png").size
    Gallery(tmp_path / "both", validated, "no", 4).write(pictures(4), "base", "The base")
    side_by_side.draw_missing()
    assert Image.open(tmp_path / "both" / "step-000002.png").size == with_two_columns, "it was not missing"
    side_by_side.draw(2)
    assert Image.open(tmp_path / "both" / "step-000002.png").width > with_two_columns[0]
