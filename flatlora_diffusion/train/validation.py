"""Pictures of the adapter in training: drawn in `eval()`, so without noise, to disk and the tracker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import nn

from flatlora_diffusion.common.devices import if_memory_lasts, release
from flatlora_diffusion.config.settings import TrainConfig
from flatlora_diffusion.draw.pipeline import conditions_of, draw
from flatlora_diffusion.draw.stamp import BASE
from flatlora_diffusion.output.gallery import Gallery, SideBySide, validation_drawing, validation_seeds
from flatlora_diffusion.output.names import step_name
from flatlora_diffusion.sdxl.encoding import PromptEmbeds
from flatlora_diffusion.sdxl.lora import evaluating
from flatlora_diffusion.train.learner import Learner
from flatlora_diffusion.train.state import TrainingState
from flatlora_diffusion.train.tracking import report_pictures


class Validation:
    """Draws the validation prompts when they are due.

    Args:
        learner: What is drawn with.
        state: Knows the average of the adapter, which is drawn with where there is one.
        config: Prompts, seeds, size, steps and guidance, and how often.
        folder: For pictures and sheets.
        images: Number of training images, for the small print.
        steps_an_epoch: Optimizer steps in a pass over the images.
        total_steps: Of the run.
        side_by_side: Shows the pictures of this run and of those that it is compared with.
    """

    def __init__(
        self,
        learner: Learner,
        state: TrainingState,
        config: TrainConfig,
        *,
        folder: Path,
        images: int,
        steps_an_epoch: int,
        total_steps: int,
        side_by_side: SideBySide | None,
    ) -> None:
        self._learner = learner
        self._state = state
        self._config = config
        self._steps_an_epoch = steps_an_epoch
        self._total_steps = total_steps
        self._side_by_side = side_by_side
        self._gallery = self._gallery_in(folder, images)

    def before(self, start: int) -> None:
        """Draw what an interruption prevented after the last step; before the first one, the base."""
        if self._learner.accelerator.is_main_process:
            if start and self.is_due(start) and not self._gallery.has(step_name(start)):
                self._show(start)
            if not start and self._side_by_side and self._will_be_due():
                self._draw_base(self._gallery_in(self._side_by_side.folder, 0))
        self._learner.accelerator.wait_for_everyone()

    def after(self, step: int) -> None:
        """Draw, if it is time: after the first epoch and then every so many, as in the diffusers script."""
        if self.is_due(step):
            if self._learner.accelerator.is_main_process:
                self._show(step)
            self._learner.accelerator.wait_for_everyone()

    def is_due(self, step: int) -> bool:
        """Whether pictures are drawn after this step."""
        config = self._config
        epoch, rest = divmod(step, self._steps_an_epoch)
        if not config.prompts_to_draw or not config.validation_epochs or rest:
            return False
        return (epoch - 1) % config.validation_epochs == 0

    def _will_be_due(self) -> bool:
        return self._steps_an_epoch <= self._total_steps and self.is_due(self._steps_an_epoch)

    def _show(self, step: int) -> None:
        with self._state.averaged():
            pictures = draw_validation(self._learner, self._config)
        if pictures is None:
            return
        trackers, epoch = self._learner.accelerator.trackers, step // self._steps_an_epoch - 1
        report_validation(pictures, step, self._gallery, self._config, trackers, epoch)
        if self._side_by_side and self._side_by_side.last == self._gallery.folder:
            self._side_by_side.draw(step)

    def _draw_base(self, gallery: Gallery) -> None:
        """Draw with an adapter that was not trained yet, which changes nothing."""
        if not gallery.has(BASE) and (pictures := draw_validation(self._learner, self._config)):
            gallery.write(pictures, BASE, "The base")

    def _gallery_in(self, folder: Path, images: int) -> Gallery:
        precision = self._learner.accelerator.mixed_precision
        return Gallery(folder, self._config, precision, images)


def draw_validation(learner: Learner, config: TrainConfig) -> list[Image.Image] | None:
    """The validation prompts drawn with the models as they are; the models are then back in training mode.

    Args:
        learner: Its UNet carries the adapter; the VAE is on the CPU.
        config: Prompts, seeds, size, steps and guidance.

    Returns:
        The pictures of the first prompt, one for each seed, then those of the next. None where the device's
        memory ran out: the log says so, and training can go on.
    """
    try:
        return if_memory_lasts(
            lambda: _draw_all(learner, config),
            lambda: None,
            "while the validation pictures were drawn: there are none this time, and training goes on; "
            "--validation_epochs 0 draws after training only",
        )
    finally:
        release()


def _draw_all(learner: Learner, config: TrainConfig) -> list[Image.Image]:
    base, prompts, accelerator = learner.base, learner.prompts, learner.accelerator
    pipeline, vae = base.pipeline(), base.vae
    assert vae is not None, "it stays in memory where pictures are to be drawn"
    drawing = validation_drawing(config)

    def conditions(prompt: str) -> dict[str, Any]:
        prompt = learner.in_tokens(prompt)
        if prompts is None:
            return conditions_of(pipeline, prompt, None, drawing)
        wanted, empty = prompts.embed([prompt]), prompts.embed([""])
        if base.zeros_for_empty_prompt:
            empty = PromptEmbeds(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))
        embeds = {
            "prompt_embeds": wanted.tokens,
            "pooled_prompt_embeds": wanted.pooled,
            "negative_prompt_embeds": empty.tokens,
            "negative_pooled_prompt_embeds": empty.pooled,
        }
        return {name: tensor.to(accelerator.device) for name, tensor in embeds.items()}

    try:
        # A VAE that stands half precision takes half the room in it, as in the comparison after training.
        precision = torch.float32 if vae.config["force_upcast"] else base.unet.conv_in.weight.dtype
        nn.Module.to(vae, accelerator.device, precision)  # the models' own warns of every change of precision
        with evaluating(learner.learning.values()), accelerator.autocast():
            return [
                draw(pipeline, seed, drawing, prompt, **conditions(prompt))
                for prompt, seed in _pictures(config)
            ]
    finally:
        vae.to("cpu")  # pyright: ignore[reportArgumentType]


def report_validation(
    pictures: Sequence[Image.Image],
    step: int,
    gallery: Gallery,
    config: TrainConfig,
    trackers: Iterable[GeneralTracker],
    epoch: int,
) -> None:
    """Write the pictures and their sheet into the gallery, and send them to TensorBoard or wandb.

    Raises:
        UserError: The disk is full or not writable.
    """
    gallery.write(pictures, step_name(step), f"{config.method} after step {step}")
    captions = [f"{prompt} (seed {seed})" for prompt, seed in _pictures(config)]
    report_pictures(trackers, "validation", pictures, captions, epoch)


def _pictures(config: TrainConfig) -> list[tuple[str, int]]:
    """Prompt and seed of every picture, in the order in which they are drawn."""
    return [(prompt, seed) for prompt in config.prompts_to_draw for seed in validation_seeds(config)]
