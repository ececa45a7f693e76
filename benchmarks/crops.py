"""Random crops of photos, always the same: more images for what has one row an image, as the CLS token has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

import clip_lens_ext as cle

SMALLEST = 0.25  # share of the photo's shorter side squared


class Crops(Dataset[Image.Image]):
    """Every photo whole, then square crops of each, half of them mirrored.

    Args:
        photos: files.
        n_crops: crops of each photo, beside the whole one.
        seed: of places and sizes.
    """

    def __init__(self, photos: Sequence[Path], n_crops: int, seed: int = 0) -> None:
        self.photos, self.n_crops = list(photos), n_crops
        generator = torch.Generator().manual_seed(seed)
        self.draws = torch.rand(len(self.photos) * n_crops, 4, generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.photos) * (1 + self.n_crops)

    def __getitem__(self, index: int) -> Image.Image:
        picture = cle.read_image(self.photos[index % len(self.photos)])
        if index < len(self.photos):
            return picture
        size, left, top, mirrored = self.draws[index - len(self.photos)]
        side = round(min(picture.size) * (SMALLEST + (1 - SMALLEST) * size) ** 0.5)
        x, y = (round(share * (whole - side)) for share, whole in zip((left, top), picture.size, strict=True))
        crop = picture.crop((x, y, x + side, y + side))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored < 0.5 else crop
