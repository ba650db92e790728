"""Whether the parts of a pipeline fit each other as SDXL's do, by their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.common.errors import UserError

_TIME_IDS = 6  # original size, crop, target size; the refiner has 5, with a score of aesthetics
REFINER = "the SDXL refiner, which has one text encoder; give the SDXL base"


def check_parts(flag: str, index: Mapping[str, Any]) -> None:
    """Refuse SDXL's refiner, which only the second text encoder serves.

    Args:
        flag: Names the base.
        index: Its `model_index.json`.

    Raises:
        UserError: It is one.
    """
    has_first, has_second = (any(index.get(part) or ()) for part in ("text_encoder", "text_encoder_2"))
    if has_second and not has_first:
        raise UserError(f"{flag}: {REFINER}")


def check_vae(flag: str, vae: Mapping[str, Any]) -> None:
    """Refuse a VAE of something else than RGB pictures.

    Raises:
        UserError: Says of how many channels it is.
    """
    encoded, decoded = vae.get("in_channels", 3), vae.get("out_channels", 3)
    if (encoded, decoded) != (3, 3):
        raise UserError(
            f"{flag}: a VAE that takes {encoded} channels and gives {decoded}; give one of RGB pictures"
        )


def check_shapes(
    flag: str,
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text_encoder: Mapping[str, Any],
    text_encoder_2: Mapping[str, Any],
) -> None:
    """Refuse parts of which one doesn't take what another gives.

    Args:
        flag: Names the base.
        unet: Its configuration, as the following.
        vae: Of the VAE that is used.
        text_encoder: Of the first text encoder.
        text_encoder_2: Of the second, whose projection gives the pooled embedding.

    Raises:
        UserError: Says what doesn't fit, and what the base is.
    """
    if unet.get("addition_embed_type") != "text_time":
        raise UserError(f"{flag}: its UNet takes no text and time embedding, so it isn't SDXL's")
    # What a configuration doesn't say has diffusers' default.
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    latents = vae.get("latent_channels", 4)
    if gives == latents and takes == 2 * latents + 1:
        raise UserError(
            f"{flag}: an inpainting base, whose UNet takes {takes} channels (latents, those of a masked "
            "picture, and the mask); give the SDXL base that it was made from"
        )
    if gives == latents and takes == 2 * latents:
        raise UserError(
            f"{flag}: an instruct-pix2pix base, whose UNet takes {takes} channels (latents, and those of the "
            "picture to edit); give the SDXL base that it was made from"
        )
    if not takes == gives == latents:
        raise UserError(
            f"{flag}: its UNet takes {takes} channels and gives {gives}, and its VAE has {latents}; "
            "give a base and a VAE that belong together"
        )
    widths = text_encoder.get("hidden_size", 0), text_encoder_2.get("hidden_size", 0)
    features = unet.get("cross_attention_dim")
    if features != sum(widths):
        raise UserError(
            f"{flag}: its UNet takes prompts of {features} features, and its text encoders give "
            f"{widths[0]} + {widths[1]}; give a base whose parts belong together"
        )
    pooled, embedded = text_encoder_2.get("projection_dim", 0), unet.get("addition_time_embed_dim") or 0
    wanted = unet.get("projection_class_embeddings_input_dim")
    if wanted != pooled + _TIME_IDS * embedded:
        raise UserError(
            f"{flag}: its UNet takes {wanted} features of prompt and size, and gets {pooled} + {_TIME_IDS} x "
            f"{embedded}; give a base whose parts belong together"
        )


def check_tokens(flag: str, tokenizer: Any, text_encoder: Mapping[str, Any]) -> None:
    """Refuse a tokenizer with tokens for which its text encoder has no embedding.

    Raises:
        UserError: Says how many there are of both.
    """
    highest, rows = max(tokenizer.get_vocab().values()), text_encoder["vocab_size"]
    if highest >= rows:
        raise UserError(
            f"{flag}: its tokens go up to {highest}, and the text encoder has {rows} embeddings; give a base "
            "whose parts belong together"
        )
