"""Pictures of a base and its adapters for the same prompts, seeds and initial noise."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from flatlora_diffusion.adapter.new_tokens import loaded_words, replace_words
from flatlora_diffusion.common.devices import if_memory_lasts, release
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.models import load_whole
from flatlora_diffusion.draw.active import activate
from flatlora_diffusion.draw.decoding import decode, decoding_dtype, why_black
from flatlora_diffusion.draw.matting import matte
from flatlora_diffusion.draw.rows import RowsAsAlone
from flatlora_diffusion.draw.samplers import DEFAULT, sampler, tell_predictions
from flatlora_diffusion.sdxl.base import check_base, load_base
from flatlora_diffusion.sdxl.encoding import encode_prompts, where_cut
from flatlora_diffusion.sdxl.single_file import SingleFile, is_single_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawing:
    """How a picture is drawn.

    Attributes:
        width: In pixels, a multiple of 8.
        height: In pixels, a multiple of 8.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        negative_prompt: What guidance steers away from.
        sampler: One of `samplers.SAMPLERS`.
        caption_chunks: Pieces in which prompts are read, see `sdxl.encoding.encode_prompts`.
        transparent: The picture's flat ground is taken away; see `matting.matte`.
    """

    width: int
    height: int
    steps: int = 50
    guidance: float = 5.0
    negative_prompt: str | None = None
    sampler: str = DEFAULT
    caption_chunks: int = 1
    transparent: bool = False


OnStep = Callable[[int, Tensor], None]
"""Called after each denoising step: its number from 1, and the latents of the pictures that are expected."""


def load_pipeline(
    base: str,
    *,
    flag: str = "--base",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> StableDiffusionXLPipeline:
    """The pipeline of an SDXL base, all of it in one precision; see `load_base`.

    Raises:
        UserError: It is missing, damaged or not SDXL.
    """
    loaded = load_base(
        base, flag=flag, dtype=dtype, vae=vae, revision=revision, variant=variant, to_draw=True
    )
    assert loaded.vae is not None
    loaded.vae.to(dtype)  # pyright: ignore[reportArgumentType]
    return loaded.pipeline().to(device)


def native_side(pipeline: StableDiffusionXLPipeline) -> int:
    """Side in pixels of the pictures that a base was trained on.

    Raises:
        UserError: It doesn't say.
    """
    return _native_side(pipeline.unet.config.sample_size, pipeline.vae_scale_factor)


def native_side_of(base: str, flag: str = "--base", revision: str | None = None) -> int:
    """The same of a base that isn't loaded: its configurations say it.

    Args:
        base: Folder or hub name of the pipeline.
        flag: How the user named it, for errors.
        revision: Revision on the hub.

    Raises:
        UserError: It is missing or not SDXL, or doesn't say.
    """
    check_base(base, flag)
    if is_single_file(base):
        base, revision = str(SingleFile(f"{flag} {base}", Path(base), own_vae=True).configurations), None
    unet, vae = (
        load_whole(f"{flag} {base}: {folder}", kind.load_config, base, subfolder=folder, revision=revision)
        for kind, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    return _native_side(unet.get("sample_size"), 2 ** (len(vae.get("block_out_channels", ())) - 1))


def _native_side(latents: object, scale: int) -> int:
    if not isinstance(latents, int):
        raise UserError(
            f"the base's unet/config.json: sample_size is {latents}; set the latents' side, as 128"
        )
    return latents * scale


def draw(
    pipeline: StableDiffusionXLPipeline, seed: int, drawing: Drawing, name: str | None = None, **prompt: Any
) -> Image.Image:
    """One picture. Its initial noise depends on the seed and the size alone, on every device and method.

    The VAE decodes in a precision that it stands, also under autocast. Where numbers overflow even so, one
    line in the log names the picture and says what to do.

    Args:
        pipeline: With the wanted adapter active.
        seed: Of the private generator of the initial noise.
        drawing: How; what it says of a negative prompt counts in `draw_batch` only.
        name: The prompt in words, for that line, where embeddings stand in for it.
        prompt: `prompt="..."`, or the embeddings that the pipeline takes in its place.
    """
    with _denoised(pipeline, [seed], drawing, None, **prompt) as latents:
        return _decoded(pipeline, latents, name or prompt["prompt"], seed, drawing.transparent)


def draw_with(
    pipeline: StableDiffusionXLPipeline,
    adapter: str | None,
    prompt: str,
    seed: int,
    drawing: Drawing,
    scale: float = 1.0,
) -> Image.Image:
    """One picture with one of the loaded adapters, or with the base alone; see `draw_batch`."""
    return draw_batch(pipeline, adapter, [(prompt, seed)], drawing, scale=scale)[0]


def draw_batch(
    pipeline: StableDiffusionXLPipeline,
    adapter: str | None,
    pictures: Sequence[tuple[str, int]],
    drawing: Drawing,
    *,
    scale: float = 1.0,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Pictures with one of the loaded adapters, or with the base alone, denoised together.

    On the CPU each has the very bits that it has alone. GPUs choose their kernels by size: there it has the
    same initial noise, and differs in the last bits.

    Args:
        pipeline: Its adapters are switched; callers that share it take turns.
        adapter: Name under which the adapter was loaded, or None.
        pictures: The prompt and the seed of each. Words for which the adapter has new tokens are replaced by
            them. The seed decides the initial noise.
        drawing: How.
        scale: Of the adapter's update.
        on_step: Told of every step. What it raises ends the drawing; the pipeline stays sound.
    """
    activate(pipeline, adapter, scale)
    words = loaded_words(pipeline, adapter)
    negative = drawing.negative_prompt and replace_words(drawing.negative_prompt, words)
    known = {
        prompt: conditions_of(pipeline, replace_words(prompt, words), negative, drawing)
        for prompt in dict.fromkeys(prompt for prompt, _ in pictures)
    }
    conditions = {
        name: torch.cat([known[prompt][name] for prompt, _ in pictures]) for name in known[pictures[0][0]]
    }
    seeds = [seed for _, seed in pictures]

    with _denoised(pipeline, seeds, drawing, on_step, **conditions) as latents:
        return [
            _decoded(pipeline, own[None], prompt, seed, drawing.transparent)
            for own, (prompt, seed) in zip(latents, pictures, strict=True)
        ]


@contextlib.contextmanager
def _denoised(
    pipeline: StableDiffusionXLPipeline,
    seeds: Sequence[int],
    drawing: Drawing,
    on_step: OnStep | None,
    **conditions: Any,
) -> Iterator[Tensor]:
    """The latents of `_denoise`; where memory is short, the text encoders are away until they are decoded."""

    def denoised() -> Tensor:
        return _denoise(pipeline, seeds, drawing, on_step, **conditions)

    with contextlib.ExitStack() as until_drawn:

        def in_less_room() -> Tensor:
            until_drawn.enter_context(_text_encoders_away(pipeline))
            return denoised()

        yield if_memory_lasts(
            denoised,
            in_less_room,
            "while a picture was drawn: it is drawn again with the text encoders in the main memory",
        )


@contextlib.contextmanager
def _text_encoders_away(pipeline: StableDiffusionXLPipeline) -> Iterator[None]:
    """The text encoders on the CPU inside the block: prompts are best encoded before it."""
    both = pipeline.text_encoder, pipeline.text_encoder_2
    text_encoders = [text_encoder for text_encoder in both if text_encoder is not None]
    devices = [text_encoder.device for text_encoder in text_encoders]
    try:
        for text_encoder in text_encoders:
            text_encoder.to("cpu")
        release()
        yield
    finally:
        for text_encoder, device in zip(text_encoders, devices, strict=True):
            text_encoder.to(device)


def where_cut_in(
    pipeline: StableDiffusionXLPipeline, adapter: str | None, prompt: str, chunks: int = 1
) -> str | None:
    """Where a prompt ends that is too long with an adapter, whose new tokens count; see `where_cut`."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    return where_cut(tokenizers, replace_words(prompt, loaded_words(pipeline, adapter)), chunks)


@torch.no_grad()
def conditions_of(
    pipeline: StableDiffusionXLPipeline, prompt: str, negative: str | None, drawing: Drawing
) -> dict[str, Tensor]:
    """One prompt's embeddings as the pipeline's arguments. Alone: its bits depend on no other's length.

    Args:
        pipeline: With the wanted adapter active.
        prompt: As the text encoders are told it.
        negative: The same; None for none.
        drawing: Its guidance and pieces count here.
    """
    guided = drawing.guidance > 1  # the pipeline's own rule
    encoders = (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2)
    wanted = encode_prompts(*encoders, [prompt], drawing.caption_chunks)
    conditions = {"prompt_embeds": wanted.tokens, "pooled_prompt_embeds": wanted.pooled}
    if guided:
        against = encode_prompts(*encoders, [negative or ""], drawing.caption_chunks)
        tokens, pooled = against.tokens, against.pooled
        if negative is None and pipeline.config["force_zeros_for_empty_prompt"]:
            tokens, pooled = torch.zeros_like(tokens), torch.zeros_like(pooled)
        conditions |= {"negative_prompt_embeds": tokens, "negative_pooled_prompt_embeds": pooled}
    return conditions


def _denoise(
    pipeline: StableDiffusionXLPipeline,
    seeds: Sequence[int],
    drawing: Drawing,
    on_step: OnStep | None,
    **conditions: Any,
) -> Tensor:
    """The pipeline's own denoising: latents (N, channels, height / 8, width / 8)."""
    settings: dict[str, Any] = {}
    own = pipeline.scheduler
    scheduler = sampler(drawing.sampler, own)
    if on_step is not None:
        predictions: deque[Tensor] = deque(maxlen=1)
        tell_predictions(scheduler, predictions.append)

        def told(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            on_step(step + 1, predictions[-1])
            return tensors

        settings["callback_on_step_end"] = told
    try:
        pipeline.scheduler = scheduler
        # It costs a little in every operation.
        together = len(seeds) > 1 and pipeline.device.type == "cpu"
        with RowsAsAlone(len(seeds)) if together else contextlib.nullcontext():
            return pipeline(
                height=drawing.height,
                width=drawing.width,
                num_inference_steps=drawing.steps,
                guidance_scale=drawing.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
                return_dict=False,
                **settings,
                **conditions,
            )[0]
    finally:
        pipeline.scheduler = own


def _decoded(
    pipeline: StableDiffusionXLPipeline, latents: Tensor, prompt: str, seed: int, transparent: bool
) -> Image.Image:
    """The picture of latents (1, channels, height, width); a transparent one is in RGBA."""
    pixels = decode(pipeline.vae, latents)
    problem = why_black(latents, pixels, pipeline.unet.dtype, decoding_dtype(pipeline.vae))
    if problem:
        logger.warning('the picture of "%s" with seed %d is black or damaged: %s', prompt, seed, problem)
    picture = _to_pictures(pipeline, pixels)[0]
    if not transparent:
        return picture
    matted = matte(picture)
    if matted is None:
        logger.warning(
            'the picture of "%s" with seed %d keeps its ground, which isn\'t flat; ask in the prompt for a '
            "plain one",
            prompt,
            seed,
        )
    return matted or picture.convert("RGBA")


def sketches(pipeline: StableDiffusionXLPipeline, latents: Tensor, longest: int = 32) -> list[Image.Image]:
    """Small pictures of latents, cheap whatever their size: what denoising has come to.

    Args:
        pipeline: Its VAE decodes.
        latents: (N, channels, height, width).
        longest: Latents with a longer side are averaged down to it first; a picture is 8 times as large.
    """
    factor = min(1.0, longest / max(latents.shape[-2:]))
    height, width = (max(1, round(side * factor)) for side in latents.shape[-2:])
    small = F.adaptive_avg_pool2d(latents.float(), (height, width)).to(latents.dtype)
    return _to_pictures(pipeline, decode(pipeline.vae, small))


def _to_pictures(pipeline: StableDiffusionXLPipeline, pixels: Tensor) -> list[Image.Image]:
    """Pixels (N, 3, height, width) in [-1, 1] as pictures; what isn't a number is black."""
    # Its declared type knows one picture only, and arrays.
    return pipeline.image_processor.postprocess(pixels.nan_to_num(nan=-1.0), output_type="pil")  # pyright: ignore[reportReturnType]
