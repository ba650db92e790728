"""A model of transformers that says in words what a picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.models import check_local, load_whole
from flatlora_diffusion.common.pictures import open_image
from flatlora_diffusion.data.images import WHITE, composite

_ADVICE = (
    "give the folder or the hub name of a captioning model, such as Salesforce/blip-image-captioning-base"
)
_LONGEST = 50  # tokens of a caption


class Captioner:
    """A captioning model, such as BLIP, in float32. The same picture gets the same words each time.

    Args:
        name: Its folder, or its name on the hub; safetensors only.
        device: Where it runs.

    Raises:
        UserError: It is missing, damaged, pickled or of another kind.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        what = f"--model {name}"
        check_local(what, name, _ADVICE)
        kind: Any = AutoModelForImageTextToText  # its types are made while it runs
        self._processor: Any = load_whole(what, AutoProcessor.from_pretrained, name)
        model = load_whole(what, kind.from_pretrained, name, use_safetensors=True, dtype=torch.float32)
        self._model = model.requires_grad_(False).eval().to(device)

    def describe(self, path: Path) -> str:
        """What the picture shows; transparent parts come on white.

        Raises:
            UserError: It cannot be read, or the model has no word for it.
        """
        shown = composite(open_image(path), WHITE)
        inputs = self._processor(images=shown, return_tensors="pt").to(self._model.device)
        with torch.no_grad():
            tokens = self._model.generate(**inputs, max_new_tokens=_LONGEST, do_sample=False)
        words = " ".join(self._processor.batch_decode(tokens, skip_special_tokens=True)[0].split())
        if not words:
            raise UserError(f"{path}: the model of --model has no word for it; write a caption by hand")
        return words
