"""What diffusers' `train_dreambooth_lora_sdxl.py` does, from loading to its last step, to measure against.

The order of operations is that script's, with its settings as `TrainConfig` names them, for what is measured:
LoRA on the UNet's attention, no class images, AdamW. With `captions` (the script's --caption_column) the text
encoders run in every step; without, all images have the instance prompt, which is embedded once. In either
case the VAE encodes in every step, in float32.

It draws the same random numbers: its losses are the script's with the same seed, bit for bit. Left out
is what would only cost it more: the `datasets` library, torchvision, a tracker, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.common import TARGETS
from flatlora_diffusion.config.settings import TrainConfig

_PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ImagesInMemory(torch.utils.data.Dataset):
    """All images, resized and cropped once at the start."""

    def __init__(self, samples: Sequence[tuple[Path, str]], config: TrainConfig) -> None:
        self.examples = []
        size = config.resolution
        for path, caption in samples:
            image = exif_transpose(Image.open(path))
            if image.mode != "RGB":
                image = image.convert("RGB")
            original_size = (image.height, image.width)
            shorter = min(original_size)
            image = image.resize(
                (size * image.width // shorter, size * image.height // shorter),
                Image.Resampling[config.image_interpolation_mode.upper()],
            )
            top = left = 0
            if image.size != (size, size):
                top = int(torch.randint(image.height - size + 1, (1,)))
                left = int(torch.randint(image.width - size + 1, (1,)))
            crop = image.crop((left, top, left + size, top + size))
            pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
            self.examples.append(
                {
                    "pixels": pixels.sub(0.5).div(0.5),
                    "caption": caption,
                    "original_size": original_size,
                    "crop_top_left": (top, left),
                }
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


def collate(examples: Sequence[dict]) -> dict:
    """A batch of the loader: images (N, 3, height, width), and lists of the rest."""
    pixels = torch.stack([example["pixels"] for example in examples])
    return {
        "pixels": pixels.to(memory_format=torch.contiguous_format).float(),
        **{
            f"{key}s": [example[key] for example in examples]
            for key in ("caption", "original_size", "crop_top_left")
        },
    }


@torch.no_grad()
def embed_prompts(
    tokenizers: Sequence, text_encoders: Sequence[nn.Module], prompts: str | list[str]
) -> tuple[Tensor, Tensor]:
    """Hidden states but for the last layer of both encoders, and the pooled output of the second."""
    hidden = []
    for tokenizer, text_encoder in zip(tokenizers, text_encoders, strict=True):
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        output = text_encoder(ids.to(text_encoder.device), output_hidden_states=True, return_dict=False)
        hidden.append(output[-1][-2])
    return torch.concat(hidden, dim=-1), output[0]


def train(
    config: TrainConfig,
    samples: Sequence[tuple[Path, str]],
    step_done: Callable[[float], None],
    *,
    captions: bool,
) -> None:
    """Train as the diffusers script does.

    Args:
        config: The settings; only those named above have an effect.
        samples: Images and their captions.
        step_done: Called with the loss after every optimizer step.
        captions: Whether each image has its caption, or all have the instance prompt.
    """
    base = config.pretrained_model_name_or_path
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
    )
    device = accelerator.device
    dtype = _PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    set_seed(config.seed)

    tokenizers = [
        AutoTokenizer.from_pretrained(base, subfolder=name) for name in ("tokenizer", "tokenizer_2")
    ]
    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    text_encoders = [
        CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2"),
    ]
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for model in (vae, *text_encoders, unet):
        model.requires_grad_(False)
    unet.to(device, dtype=dtype)
    vae.to(device, dtype=torch.float32)
    for text_encoder in text_encoders:
        text_encoder.to(device, dtype=dtype)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.add_adapter(
        LoraConfig(
            r=config.rank,
            lora_alpha=config.rank,
            lora_dropout=config.lora_dropout,
            init_lora_weights="gaussian",
            target_modules=TARGETS,
        )
    )
    if config.mixed_precision == "fp16":
        cast_training_params([unet], dtype=torch.float32)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained, "lr": config.learning_rate}],
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    loader = torch.utils.data.DataLoader(
        ImagesInMemory(samples, config),
        batch_size=config.train_batch_size,
        shuffle=True,
        collate_fn=collate,
    )

    def time_ids(original_size: tuple[int, int], crop_top_left: tuple[int, int]) -> Tensor:
        ids = [*original_size, *crop_top_left, config.resolution, config.resolution]
        return torch.tensor([ids]).to(device, dtype=dtype)

    if not captions:
        tokens, pooled = embed_prompts(tokenizers, text_encoders, config.instance_prompt)
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    unet, optimizer, loader, lr_scheduler = accelerator.prepare(unet, optimizer, loader, lr_scheduler)
    progress = tqdm(range(config.max_train_steps), desc="Steps")
    done = 0
    steps_an_epoch = math.ceil(len(loader) / config.gradient_accumulation_steps)
    for _ in range(math.ceil(config.max_train_steps / steps_an_epoch)):
        unet.train()
        for batch in loader:
            with accelerator.accumulate(unet):
                pixels = batch["pixels"].to(dtype=vae.dtype)
                if captions:
                    tokens, pooled = embed_prompts(tokenizers, text_encoders, batch["captions"])
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                latents = latents.to(dtype)
                noise = torch.randn_like(latents)
                size = latents.shape[0]
                levels = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, levels, (size,), device=latents.device).long()
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                sizes_and_crops = zip(batch["original_sizes"], batch["crop_top_lefts"], strict=True)
                conditions = {"time_ids": torch.cat([time_ids(*values) for values in sizes_and_crops])}
                repeats = 1 if captions else size
                conditions["text_embeds"] = pooled.repeat(repeats, 1)
                predicted = unet(
                    noisy,
                    timesteps,
                    tokens.repeat(repeats, 1, 1),
                    added_cond_kwargs=conditions,
                    return_dict=False,
                )[0]
                target = noise
                if noise_scheduler.config.prediction_type == "v_prediction":
                    target = noise_scheduler.get_velocity(latents, noise, timesteps)
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, config.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0]}
            if accelerator.sync_gradients:
                progress.update(1)
                done += 1
            progress.set_postfix(**logs)
            accelerator.log(logs, step=done)
            if accelerator.sync_gradients:
                step_done(logs["loss"])
            if done >= config.max_train_steps:
                return
