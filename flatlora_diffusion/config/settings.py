"""The settings of a training run: one validated dataclass, from which the command line is made.

Names, meaning and defaults are those of the diffusers script `train_dreambooth_lora_sdxl.py`, for all that
both have. Standard library only.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any, cast

from flatlora_diffusion.common.command import is_unicode
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.config.contradictions import reject_contradictions
from flatlora_diffusion.config.layers import parse_layers, split_layers
from flatlora_diffusion.config.options import (
    BELOW_ONE,
    FRACTION,
    FROM_2,
    FROM_8,
    INITIALISATION,
    LEARNING_RATE,
    MULTIPLE_OF_8,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    option,
)

logger = logging.getLogger(__name__)

PLAIN, FLAT = "LoRA", "Flat-LoRA"
"""The methods: what a run, its adapter and its pictures are called by."""

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "prodigy")
FLAT_SCHEDULES = ("cosine", "linear", "constant")
FLAT_NOISES = ("table", "gaussian")
QUANTISATIONS = ("4bit", "8bit")
VALIDATION_SAMPLERS = ("default", "Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "UniPC", "DDIM")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of DreamBooth LoRA training, or with `compare` a plain and a Flat-LoRA run.

    Raises:
        UserError: A value is out of range; the message names the flag.
    """

    # The base model.
    pretrained_model_name_or_path: str = option(
        REQUIRED,
        "Folder of an SDXL pipeline in the diffusers format, its name on the Hugging Face Hub, or a base in "
        "one .safetensors file.",
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None, "A better VAE (for half precision, say); without it the base's own runs in float32."
    )
    revision: str | None = option(None, "Revision of the base on the hub.")
    variant: str | None = option(None, "Variant of the base's weight files, such as fp16.")
    quantize_base: str | None = option(
        None,
        "Keep the UNet's linear layers in 4 bits (NF4 with double quantisation, as in QLoRA) or in 8 "
        "(LLM.int8()); needs bitsandbytes.",
        QUANTISATIONS,
    )

    # The data.
    instance_data_dir: str | None = option(
        None, "Folder with the training images; or give dataset_name.", decides=False
    )
    dataset_name: str | None = option(
        None,
        "Dataset of the Hugging Face Hub with the training images in its train split, or a local folder that "
        "the datasets library reads (parquet files, images with metadata.jsonl or metadata.csv, ...).",
        decides=False,
    )
    dataset_config_name: str | None = option(
        None, "Configuration of the dataset, where it has several.", decides=False
    )
    cache_dir: str | None = option(
        None, "Folder for what the datasets library downloads and converts. Default: its own.", decides=False
    )
    image_column: str = option("image", "Column of the dataset that holds the images.", decides=False)
    caption_column: str | None = option(
        None,
        "Column of the dataset that holds the captions; without it instance_prompt is the caption of all. "
        "For a folder of images: the key of the captions in metadata.jsonl or metadata.csv; text by default.",
        decides=False,
    )
    instance_prompt: str = option(
        REQUIRED,
        "Prompt of every image that has no caption of its own. Captions of a folder come from metadata.jsonl "
        "or metadata.csv (file_name, text) or from .txt or .caption files beside the images. Captions may "
        "say {instance_prompt}.",
    )
    kohya_folders: bool = option(
        False,
        "Read sub-folders that are named as for kohya's scripts too: an epoch sees the images of 10_fox 10 "
        "times, and their caption is fox where they have none.",
        decides=False,
    )
    repeats: int = option(
        1, "How often an epoch passes over the training images.", rules=(POSITIVE,), decides=False
    )
    resolution: int = option(
        1024,
        "Images are resized to this many pixels on their shorter side, and cropped.",
        rules=(POSITIVE, FROM_8),
    )
    aspect_buckets: bool = option(
        False, "Keep the shape of images: batches of one size each, all of about resolution x resolution."
    )
    center_crop: bool = option(False, "Crop in the centre, not at random.")
    random_flip: bool = option(False, "Mirror images at random.")
    image_interpolation_mode: str = option("lanczos", "How images are resized.", INTERPOLATIONS)
    background: str = option(
        "white",
        "Colour under the transparent parts of images: a name, #rrggbb, or random (another one each time).",
    )
    caption_dropout_rate: float = option(
        0.0, "Share of the samples whose caption is replaced by the empty prompt.", rules=(FRACTION,)
    )
    shuffle_caption: bool = option(
        False, "Shuffle the comma-separated tags of captions; each caption has up to 8 orders."
    )
    keep_tokens: int = option(
        0, "So many tags at the start of a caption keep their place.", rules=(NOT_NEGATIVE,)
    )
    caption_chunks: int = option(
        1,
        "Read captions and prompts in so many pieces, of 75 tokens for SDXL: longer ones are not cut, as in "
        "A1111, ComfyUI and kohya's scripts.",
        rules=(POSITIVE,),
        later=True,
    )

    cache: bool = option(
        True,
        "Encode images and prompts anew, and don't keep the result for later runs. Else it is kept in the "
        "user's cache folder, or where the environment's FLATLORA_CACHE says; the log names the folder.",
        decides=False,
        only_off=True,
    )

    # Prior preservation.
    with_prior_preservation: bool = option(
        False, "Add the loss of class images, so that the class stays what it was."
    )
    class_data_dir: str | None = option(
        None, "Folder of class images; the base draws those that are missing.", decides=False
    )
    class_prompt: str | None = option(None, "Prompt of the class images.")
    prior_loss_weight: float = option(1.0, "Weight of the class images' loss.", rules=(NOT_NEGATIVE,))
    num_class_images: int = option(
        100, "How many class images there should be.", rules=(POSITIVE,), decides=False
    )
    class_resolution: int | None = option(
        None,
        "Side in pixels of the class images that are drawn. Default: that of the pictures that the base was "
        "made for.",
        rules=(POSITIVE, MULTIPLE_OF_8),
        decides=False,
    )
    sample_batch_size: int = option(4, "Class images drawn at once.", rules=(POSITIVE,), decides=False)
    prior_generation_precision: str | None = option(
        None,
        "Precision in which class images are drawn. Default: fp16 on a GPU, else fp32.",
        ("no", "fp32", "fp16", "bf16"),
        decides=False,
    )

    # Held-out images.
    heldout_data_dir: str | None = option(
        None,
        "Folder of images that are not trained; their loss is logged at fixed timesteps and noise.",
        decides=False,
    )
    heldout_split: str | None = option(
        None, "Split of the dataset, such as validation, to be held out in place of a folder.", decides=False
    )
    heldout_steps: int = option(
        50, "Measure the held-out loss every so many steps, and at the end.", rules=(POSITIVE,), decides=False
    )
    stop_when_worse: int | None = option(
        None,
        "Stop when the held-out loss was not below its lowest in so many measurements in a row.",
        rules=(POSITIVE,),
        later=True,
    )
    folds: int | None = option(
        None,
        "Where no image can be held out: train so many times without a part of the images, find the number "
        "of steps after which the loss of that part is lowest, then train on all images for so many; with "
        "use_ema they also find whether the average is better.",
        rules=(FROM_2,),
        later=True,
    )

    # The adapter.
    rank: int = option(4, "Rank of the LoRA.", rules=(POSITIVE,))
    lora_alpha: float | None = option(
        None,
        "LoRA alpha; the update is scaled by alpha / rank. Default: the rank, that of each layer.",
        rules=(POSITIVE,),
    )
    lora_dropout: float = option(0.0, "Dropout before the LoRA's A, in training only.", rules=(BELOW_ONE,))
    use_dora: bool = option(False, "Train a DoRA: the magnitude of each filter apart from its direction.")
    use_rslora: bool = option(False, "Scale the update by alpha / sqrt(rank) (rsLoRA).")
    init_lora_weights: str = option(
        "gaussian",
        "How the LoRA starts, as PEFT does it: gaussian (a normal A, as in the diffusers script), default "
        "(a uniform A), pissa or pissa_niter_N (principal components of the base's weights, by an exact SVD "
        "or by one of N iterations), olora (their QR decomposition), eva (principal components of what the "
        "layers are shown) or lora_ga (those of the base's gradients).",
        rules=(INITIALISATION,),
    )
    lora_weights: str | None = option(
        None,
        "Start from this adapter: a file in the format of diffusers, kohya or PEFT, or its folder. Its rank, "
        "alpha and layers must be those of this run. The file's digest is one of the settings of the run.",
        decides=False,  # its digest does
    )
    scale_weight_norms: float | None = option(
        None,
        "Max-norm regularisation as in kohya's scripts: after each step, layers whose update s*B@A has a "
        "greater Frobenius norm than this are scaled down to it (1 is a good start).",
        rules=(POSITIVE,),
    )
    use_ema: bool = option(
        False,
        "Average the adapter over the steps (EMA): the saved adapter, validation pictures and held-out loss "
        "are the average's. pytorch_lora_weights_live.safetensors, beside the saved one, is not averaged.",
    )
    ema_decay: float = option(
        0.999,
        "Decay of the average at most; after t steps it is t / (t + 9) where that is less.",
        rules=(BELOW_ONE,),
    )
    lora_layers: tuple[str, ...] | None = option(
        None,
        "Ends of the names of the UNet's layers that get a LoRA, such as to_k to_q to_v to_out.0 (these are "
        "the default) ff.net.0.proj ff.net.2 proj_in proj_out conv1 conv2. They may be patterns with a star, "
        'and have a rank of their own: "down_blocks.2.*.to_*=8". Of those that fit, the last rank counts.',
    )
    train_text_encoder: bool = option(False, "Train LoRA layers in both text encoders too.")
    train_text_encoder_frac: float = option(
        1.0,
        "After this fraction of the steps the text encoders' LoRA is trained no further.",
        rules=(FRACTION,),
        decides=False,
    )

    # Pivotal tuning.
    train_text_encoder_ti: bool = option(
        False, "Train the embeddings of new tokens in both text encoders (textual inversion) with the LoRA."
    )
    train_text_encoder_ti_frac: float = option(
        0.5,
        "After this fraction of the steps the new tokens are trained no further.",
        rules=(FRACTION,),
        decides=False,
    )
    token_abstraction: str = option(
        "TOK",
        "The word of prompts and captions that new tokens replace; several with commas between them.",
    )
    num_new_tokens_per_abstraction: int = option(
        2, "How many new tokens replace such a word.", rules=(POSITIVE,)
    )

    # Flat-LoRA.
    flat_sigma: float = option(
        0.1,
        "Strength of Flat-LoRA's noise on the merged weights, relative to each filter; 0 is plain LoRA.",
        rules=(NOT_NEGATIVE,),
    )
    flat_schedule: str = option("cosine", "How the noise grows over the run.", FLAT_SCHEDULES)
    flat_noise: str = option("table", "Source of the noise: a table of normals, or fresh ones.", FLAT_NOISES)
    compare: bool = option(
        False,
        "Train plain LoRA and then Flat-LoRA from the same initial adapter, data order, timesteps and noise, "
        "into lora/ and flat_lora/ under the output folder, and draw both beside the base.",
        decides=False,
    )

    # The objective.
    snr_gamma: float | None = option(
        None,
        "Min-SNR loss weights with this gamma (the paper, arXiv 2303.09556, has 5); none without it.",
        rules=(POSITIVE,),
    )
    alpha_mask: bool = option(
        False,
        "Weigh the loss by the images' alpha, averaged over each place of the latents: what is opaque "
        "counts, the ground doesn't.",
        later=True,
    )
    alpha_background_weight: float = option(
        0.0,
        "With alpha_mask: how much transparent parts count, where opaque ones count 1.",
        rules=(FRACTION,),
        later=True,
    )
    noise_offset: float = option(
        0.0,
        "Adds this times one normal a channel to the noise, so that whole images can be dark or bright.",
        rules=(NOT_NEGATIVE,),
    )
    ip_noise_gamma: float = option(
        0.0,
        "Input perturbation, as in kohya's scripts: what the UNet is shown has this times further normals "
        "on top of the noise that it is to predict (the paper, arXiv 2301.11706, has 0.1).",
        rules=(NOT_NEGATIVE,),
        later=True,
    )

    # The optimisation.
    train_batch_size: int = option(4, "Images a step, on each device.", rules=(POSITIVE,))
    gradient_accumulation_steps: int = option(1, "Micro-batches an optimizer step.", rules=(POSITIVE,))
    num_train_epochs: int = option(
        1, "Passes over the images; max_train_steps overrides it.", rules=(POSITIVE,), decides=False
    )
    max_train_steps: int | None = option(None, "Optimizer steps in all.", rules=(POSITIVE,), decides=False)
    learning_rate: float = option(1e-4, "Initial learning rate, after warm-up.", rules=LEARNING_RATE)
    text_encoder_lr: float = option(5e-6, "Learning rate of the text encoders.", rules=LEARNING_RATE)
    scale_lr: bool = option(
        False,
        "Multiply the learning rate (not that of the text encoders) by devices, accumulation steps and "
        "batch size.",
    )
    lr_scheduler: str = option("constant", "Schedule of the learning rate.", LR_SCHEDULERS)
    lr_warmup_steps: int = option(
        500, "Warm-up steps, for the schedules that have a warm-up.", rules=(NOT_NEGATIVE,)
    )
    lr_num_cycles: int = option(1, "Hard resets of cosine_with_restarts.", rules=(POSITIVE,))
    lr_power: float = option(1.0, "Power of the polynomial schedule.")
    text_encoder_2_lr: float | None = option(
        None,
        "Learning rate of the second text encoder. Default: that of --text_encoder_lr.",
        rules=LEARNING_RATE,
    )
    loraplus_lr_ratio: float | None = option(
        None,
        "LoRA+: the learning rate of B is so many times that of A; 16 is a usual ratio.",
        rules=(POSITIVE,),
    )
    optimizer: str = option("adamw", "The optimizer; a name that isn't known means adamw.", OPTIMIZERS)
    use_8bit_adam: bool = option(False, "Keep AdamW's moments in 8 bits (needs bitsandbytes).")
    adam_beta1: float = option(0.9, "First beta of AdamW and Prodigy.", rules=(BELOW_ONE,))
    adam_beta2: float = option(0.999, "Second beta of AdamW and Prodigy.", rules=(BELOW_ONE,))
    prodigy_beta3: float | None = option(
        None, "Third beta of Prodigy. Default: the root of the second.", rules=(BELOW_ONE,)
    )
    prodigy_decouple: bool = option(True, "Prodigy with AdamW's kind of weight decay.")
    prodigy_use_bias_correction: bool = option(True, "Prodigy with Adam's bias correction.")
    prodigy_safeguard_warmup: bool = option(True, "Prodigy that does not take warm-up for progress.")
    adam_weight_decay: float = option(1e-4, "Weight decay of the UNet's LoRA.", rules=(NOT_NEGATIVE,))
    adam_weight_decay_text_encoder: float = option(
        1e-3, "Weight decay of the text encoders' LoRA.", rules=(NOT_NEGATIVE,)
    )
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.", rules=(NOT_NEGATIVE,))
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", rules=(POSITIVE,))
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass to save memory.", decides=False
    )
    mixed_precision: str | None = option(
        None, "Precision of the frozen base; LoRA parameters are always float32.", ("no", "fp16", "bf16")
    )
    allow_tf32: bool = option(False, "Allow TF32 matrix products on Ampere and later GPUs.")
    deterministic: bool = option(
        False,
        "Ask PyTorch for algorithms that repeat to the bit: on a GPU others don't, so that a run that was "
        "resumed ends in nearly the same adapter only. Backward passes of attention and convolutions take "
        "longer, and some more memory. On the CPU it changes nothing.",
        decides=False,
    )
    seed: int = option(0, "Decides everything random: runs can always be repeated.", rules=(NOT_NEGATIVE,))

    # Output, checkpoints, tracking.
    output_dir: str = option(
        "lora-dreambooth-model", "Folder for the adapter, the checkpoints and the logs.", decides=False
    )
    output_kohya_format: bool = option(
        False, "Write the adapter for ComfyUI, A1111 and kohya's scripts too.", decides=False
    )
    checkpointing_steps: int = option(
        500, "Write a checkpoint every so many steps.", rules=(POSITIVE,), decides=False
    )
    checkpoints_total_limit: int | None = option(
        None, "Keep only so many checkpoints, the newest.", rules=(POSITIVE,), decides=False
    )
    resume_from_checkpoint: str | None = option(
        None,
        '"latest", the name of a checkpoint in the output folder (checkpoint-500), or the path of one.',
        decides=False,
    )
    logging_dir: str = option(
        "logs", "Folder for the tracker's logs, inside the output folder.", decides=False
    )
    report_to: str | None = option("tensorboard", "Tracker that accelerate knows, or none.", decides=False)

    # The hub.
    push_to_hub: bool = option(
        False,
        "Upload the output folder, but for checkpoints and logs, to the Hugging Face Hub at the end.",
        decides=False,
    )
    hub_token: str | None = option(
        None,
        "Token for the upload; it is written nowhere. Default: that of `hf auth login`.",
        secret=True,
        decides=False,
    )
    hub_model_id: str | None = option(
        None,
        "Repository on the hub, NAME or OWNER/NAME. Default: the name of the output folder.",
        decides=False,
    )

    # Validation.
    validation_prompt: tuple[str, ...] | None = option(
        None, "One or more prompts to draw during and after training.", decides=False
    )
    num_validation_images: int = option(
        4,
        "Pictures of each validation prompt, with seeds counted from --seed; 0: none are drawn.",
        rules=(NOT_NEGATIVE,),
        decides=False,
    )
    validation_epochs: int = option(
        50,
        "Draw the validation prompts every so many epochs; 0: only after training.",
        rules=(NOT_NEGATIVE,),
        decides=False,
    )
    validation_inference_steps: int = option(
        50, "Denoising steps of a validation picture.", rules=(POSITIVE,), decides=False
    )
    final_inference_steps: int | None = option(
        None,
        "Denoising steps of the pictures after training. Default: 25, or those of validation where these are "
        "fewer.",
        rules=(POSITIVE,),
        decides=False,
    )
    validation_sampler: str = option(
        "DPM++ 2M",
        "Sampler of the pictures during and after training; default is the base's own.",
        VALIDATION_SAMPLERS,
        decides=False,
    )
    validation_resolution: int | None = option(
        None,
        "Side of these pictures in pixels. Default: that of the pictures that the base was made for.",
        rules=(POSITIVE, MULTIPLE_OF_8),
        decides=False,
    )
    validation_guidance_scale: float = option(
        5.0, "Classifier-free guidance of a validation picture.", rules=(NOT_NEGATIVE,), decides=False
    )

    def __post_init__(self) -> None:
        """Check every value by itself, and those that depend on each other."""
        self._choose_optimizer()
        if self.image_interpolation_mode == "nearest_exact":  # as torchvision does with Pillow's images
            object.__setattr__(self, "image_interpolation_mode", "nearest")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise UserError(f"--{field.name} {value}: not one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{field.name} {value}: must be a finite number")
            for text in cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not is_unicode(text):
                    raise UserError(f"--{field.name} {text!a}: not text in UTF-8; give it another name")
            for rule in field.metadata["rules"]:
                if value is not None and not rule.holds(value):
                    raise UserError(f"--{field.name} {value}: {rule.text}")
        last = 2**64 - self.num_validation_images  # pictures have seeds of their own, and a seed has 64 bits
        if self.seed > last:
            raise UserError(f"--seed {self.seed}: must be at most {last}")
        if self.lora_layers is not None:
            object.__setattr__(self, "lora_layers", split_layers(self.lora_layers))
            parse_layers(self.lora_layers)
        reject_contradictions(self)

    def _choose_optimizer(self) -> None:
        """Read the optimizer as the diffusers script does: in any case, and an unknown one as AdamW."""
        name = self.optimizer.lower()
        if name not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            logger.warning("--optimizer %s: not one of %s; AdamW is taken", self.optimizer, known)
            name = "adamw"
        object.__setattr__(self, "optimizer", name)
        if self.use_8bit_adam and name != "adamw":
            logger.warning("--use_8bit_adam has no effect with --optimizer %s", name)
            object.__setattr__(self, "use_8bit_adam", False)

    def settings(self) -> dict[str, Any]:
        """Every setting by name, but for secrets: what may be written to files and sent to trackers."""
        secrets = {field.name for field in dataclasses.fields(self) if field.metadata["secret"]}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in secrets}

    @property
    def method(self) -> str:
        """`FLAT` where the weights get noise, else `PLAIN`."""
        return FLAT if self.flat_sigma else PLAIN

    @property
    def prompts_to_draw(self) -> tuple[str, ...]:
        """The validation prompts, where pictures of them are wanted."""
        return (self.validation_prompt or ()) if self.num_validation_images else ()

    @property
    def final_steps(self) -> int:
        """Denoising steps of the pictures after training."""
        return self.final_inference_steps or min(25, self.validation_inference_steps)

    @property
    def second_text_encoder_lr(self) -> float:
        """Learning rate of the second text encoder: that of the first where none is given."""
        return self.text_encoder_lr if self.text_encoder_2_lr is None else self.text_encoder_2_lr

    @property
    def starts_with_update(self) -> bool:
        """Whether B @ A isn't zero at the start, so that a frozen adapter takes it away again."""
        return self.init_lora_weights not in ("gaussian", "default", "eva")

    @property
    def abstractions(self) -> list[str]:
        """The words that new tokens replace."""
        return [word.strip() for word in self.token_abstraction.split(",")]

    def text_encoder_steps(self, total_steps: int) -> int:
        """How many of the steps train the text encoders, their LoRA or their new tokens."""
        if not (self.train_text_encoder or self.train_text_encoder_ti):
            return 0
        ti = self.train_text_encoder_ti
        fraction = self.train_text_encoder_ti_frac if ti else self.train_text_encoder_frac
        return math.floor(round(fraction * total_steps, 6))  # 0.29 of 100 are 29, whatever floats say

    @property
    def alpha(self) -> float:
        """LoRA alpha: the rank where none is given."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def has_own_ranks(self) -> bool:
        """Whether some layers have another rank than `rank`."""
        return any(rank not in (None, self.rank) for _, rank in parse_layers(self.lora_layers or ()))

    def scale(self, rank: int) -> float:
        """The factor on B @ A in a layer of this rank."""
        alpha = rank if self.lora_alpha is None else self.lora_alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)
