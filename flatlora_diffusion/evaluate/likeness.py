"""How alike pictures and prompts are, to the eyes of a CLIP.

All measures take unit features, as `Likeness` gives them: (N, features), one row a picture or a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.common.models import check_local, check_vocabulary, load_whole
from flatlora_diffusion.data.images import WHITE, composite
from flatlora_diffusion.draw.difference import difference

BATCH = 32
_ADVICE = "give the folder or the hub name of a CLIP with both towers, such as openai/clip-vit-large-patch14"

Item = TypeVar("Item")


class Likeness:
    """A CLIP of transformers, in float32.

    Args:
        name: Its folder, or its name on the hub; safetensors only.
        device: Where it runs.

    Raises:
        UserError: It is missing, damaged, pickled or not a CLIP.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        check_local(name, name, _ADVICE)
        kind = load_whole(name, lambda: CLIPConfig.get_config_dict(name)[0].get("model_type"))
        if kind != CLIPConfig.model_type:
            raise UserError(f"{name}: {f'a {kind}' if kind else 'some model'}, not a CLIP; {_ADVICE}")
        processor = load_whole(name, CLIPProcessor.from_pretrained, name)
        model = load_whole(name, CLIPModel.from_pretrained, name, use_safetensors=True, dtype=torch.float32)
        check_vocabulary(name, processor.tokenizer)
        self._model = model.requires_grad_(False).eval().to(device)
        self._tokenizer, self._image_processor = processor.tokenizer, processor.image_processor

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit features (N, features) of pictures, on the CPU; what is transparent comes on white."""

        def embed(batch: Sequence[Image.Image]) -> Tensor:
            shown = [composite(picture, WHITE) for picture in batch]
            pixels = self._image_processor(shown, return_tensors="pt").pixel_values
            seen = self._model.vision_model(pixels.to(self._model.device)).pooler_output
            return self._model.visual_projection(seen)

        return _embed(embed, pictures)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit features (N, features) of prompts, on the CPU; what is too long for the CLIP is cut off."""

        def embed(batch: Sequence[str]) -> Tensor:
            longest = self._model.config.text_config.max_position_embeddings
            tokens = self._tokenizer(
                list(batch), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
            ).to(self._model.device)
            read = self._model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask)
            return self._model.text_projection(read.pooler_output)

        return _embed(embed, texts)


def _embed(embed: Callable[[Sequence[Item]], Tensor], items: Sequence[Item]) -> Tensor:
    """Unit features of all items, a batch at a time."""
    with torch.no_grad():
        batches = [embed(items[start : start + BATCH]).cpu() for start in range(0, len(items), BATCH)]
    return F.normalize(torch.cat(batches), dim=-1)


def paired_similarity(one: Tensor, other: Tensor) -> float:
    """Mean cosine of row i of the one with row i of the other.

    Of drawn pictures and true ones of the same captions it is CLIP-I, of pictures and their prompts CLIP-T.

    Args:
        one: (N, features), unit rows.
        other: The same shape.

    Raises:
        ValueError: The shapes differ.
    """
    _check_pairs(one, other)
    return float((one.double() * other.double()).sum(dim=-1).mean())


def _check_pairs(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:  # rows would be broadcast
        raise ValueError(f"{list(one.shape)} and {list(other.shape)}: pairs need as many of both")


def nearest_similarity(pictures: Tensor, training: Tensor) -> float:
    """Mean over pictures of the cosine with the nearest training picture: 1 where all are copies.

    Args:
        pictures: (N, features), unit rows.
        training: (M, features), unit rows.
    """
    return float((pictures.double() @ training.double().T).amax(dim=1).mean())


def drift(pictures: Tensor, base: Tensor) -> float:
    """Mean of 1 - cosine between pictures and those of the base for the same prompts and seeds: 0 to 2.

    Args:
        pictures: (N, features), unit rows.
        base: The same shape.

    Raises:
        ValueError: The shapes differ.
    """
    _check_pairs(pictures, base)
    # 1 - <a, b> = ||a - b||^2 / 2 of unit vectors: 0 for the base itself, not a rounding error.
    return float((pictures.double() - base.double()).square().sum(dim=-1).mean() / 2)


def pixel_drift(pictures: Sequence[Image.Image], base: Sequence[Image.Image]) -> float:
    """Mean absolute difference of pixels in [0, 1] between pictures and the base's: 0 to 1.

    Args:
        pictures: N pictures.
        base: Those of the same prompts and seeds, each of the same size.

    Raises:
        ValueError: There are more of one, or two have different sizes.
    """
    pairs = zip(pictures, base, strict=True)
    found = [difference(composite(one, WHITE), composite(other, WHITE)) for one, other in pairs]
    return sum(each.mean_percent for each in found) / (100 * len(found))
