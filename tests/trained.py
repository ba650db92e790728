"""A finished comparison on the tiny base, trained once for all tests that only read it or copy it.

Test files say `pytest_plugins = ["tests.trained"]` and take the fixture `comparison`; an imported fixture
would be made once for each file. PYTEST_DONT_REWRITE: the constants are imported before the plugin.
"""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.train.arms import train

STEPS, SIGMA = 6, 0.3


@pytest.fixture(scope="session")
def comparison(base_path, tmp_path_factory) -> Path:
    """Six steps of LoRA and of Flat-LoRA, a checkpoint after the fourth, pictures and held-out losses."""
    folder = tmp_path_factory.mktemp("comparison")
    for name in ("icons", "heldout"):
        (folder / name).mkdir()
    for index, colour in enumerate(("red", "green", "blue", "orange")):
        Image.new("RGB", (20 + index, 20), colour).save(folder / "icons" / f"{colour}.png")
    Image.new("RGB", (20, 20), "navy").save(folder / "heldout" / "navy.png")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(
        TrainConfig(
            pretrained_model_name_or_path=str(base_path),
            instance_data_dir=str(folder / "icons"),
            heldout_data_dir=str(folder / "heldout"),
            heldout_steps=2,
            instance_prompt="a icon",
            output_dir=str(folder / "compared"),
            compare=True,
            flat_sigma=SIGMA,
            resolution=16,
            train_batch_size=2,
            max_train_steps=STEPS,
            checkpointing_steps=4,
            learning_rate=1e-2,
            validation_prompt=("a <b>icon</b> ${1+1} {{x}}",),
            num_validation_images=2,
            validation_epochs=1,
            validation_inference_steps=1,
            report_to="none",
        )
    )
    return folder / "compared"
