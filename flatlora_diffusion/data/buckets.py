"""Aspect buckets: sizes of about one area, and the endless sequence of batches that each have one size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flatlora_diffusion.common.seeds import hash64

MAX_RATIO = 2.5  # of the longer side to the shorter; what is longer still is cropped


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """The sizes (height, width) that images may have: at most `resolution` squared, sides on a grid.

    The grid has `resolution / 16` pixels (64 at 1024, as in SDXL's own training), at least 8.
    """
    grid = max(8, resolution // 128 * 8)
    sizes = {(resolution, resolution)}
    for short in range(grid, resolution + 1, grid):
        long = resolution * resolution // short // grid * grid
        if long / short <= MAX_RATIO:
            sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(image: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size (height, width) whose aspect ratio is nearest to the image's; of equal ones the largest."""
    ratio = math.log(image[0] / image[1])

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - ratio), 6), -size[0] * size[1]

    return min(sizes, key=distance)


class BatchSequence:
    """Which bucket the n-th batch comes from, and which samples of the bucket's own stream it takes.

    Every bucket has batches in proportion to its samples: up to the end of epoch `e` (an epoch is as many
    samples as there are in all) a bucket of `c` samples has given `floor(e * c / batch_size)` batches. So no
    sample is shown more often than another, and none is left out, whatever the sizes. Their order within an
    epoch is a function of (seed, epoch). With one bucket, batch `n` starts at sample `n * batch_size`.

    Args:
        counts: Samples in each bucket.
        batch_size: Samples in a batch.
        seed: Decides the order.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int) -> None:
        self._counts = counts
        self._batch_size = batch_size
        self._seed = seed

    def locate(self, number: int) -> tuple[int, int]:
        """The bucket of batch `number`, and where in the bucket's stream of samples the batch starts."""
        epoch = number * self._batch_size // sum(self._counts)
        while self._before(epoch + 1) <= number:
            epoch += 1
        place = number - self._before(epoch)
        order = self._order(epoch)
        bucket = order[place]
        earlier = self._given(bucket, epoch) + order[:place].count(bucket)
        return bucket, earlier * self._batch_size

    def _given(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket before an epoch."""
        return epoch * self._counts[bucket] // self._batch_size

    def _before(self, epoch: int) -> int:
        return sum(self._given(bucket, epoch) for bucket in range(len(self._counts)))

    def _order(self, epoch: int) -> list[int]:
        batches = [
            bucket
            for bucket in range(len(self._counts))
            for _ in range(self._given(bucket, epoch + 1) - self._given(bucket, epoch))
        ]
        draw = torch.Generator().manual_seed(hash64(self._seed, "bucket order", epoch))
        return [batches[index] for index in torch.randperm(len(batches), generator=draw)]
