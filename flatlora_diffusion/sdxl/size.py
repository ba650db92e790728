"""How large the UNet of a base is, before it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from flatlora_diffusion.common.models import load_whole
from flatlora_diffusion.sdxl.base import BASE_FLAG, check_base
from flatlora_diffusion.sdxl.single_file import SingleFile, is_single_file

SDXL_PARAMETERS = 2_567_463_684


def unet_parameters(base: str, flag: str = BASE_FLAG, revision: str | None = None) -> int:
    """How many parameters it has, by its configuration.

    Args:
        base: Folder or hub name of the pipeline, or a single file.
        flag: How the user named it, for errors.
        revision: Revision on the hub.

    Raises:
        UserError: It is missing or not SDXL.
    """
    check_base(base, flag)
    where = f"{flag} {base}"
    if is_single_file(base):
        base, revision = str(SingleFile(where, Path(base), own_vae=True).configurations), None
    load = UNet2DConditionModel.load_config
    config = load_whole(f"{where}: unet", load, base, subfolder="unet", revision=revision)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert isinstance(unet, UNet2DConditionModel), "so it is called"
    return sum(parameter.numel() for parameter in unet.parameters())
