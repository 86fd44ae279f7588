"""Image encoder of Diffusion Policy (Chi et al. 2023, section 3.2): a ResNet with group norm and a spatial softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm_1 = nn.GroupNorm(max(outputs // 16, 1), outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_2 = nn.GroupNorm(max(outputs // 16, 1), outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if (stride, inputs) != (1, outputs) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_1(self.conv_1(x)))
        return F.relu(self.norm_2(self.conv_2(h)) + self.skip(x))


class ImageEncoder(nn.Module):
    """uint8 or [0, 1] float images (B, height, width, 3) -> (B, 2 keypoints): where each feature map is brightest.

    The spatial softmax (Finn et al. 2016) gives image coordinates in [-1, 1].
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), keypoints: int = 32, crop: int | None = None) -> None:
        super().__init__()
        self.crop = crop
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        stages = zip([widths[0], *widths[:-1]], widths)
        self.stages = nn.Sequential(*(_Residual(i, o, 2) for i, o in stages))
        self.maps = nn.Conv2d(widths[-1], keypoints, 1)
        self.output_dim = 2 * keypoints

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2)
        x = x.float() / 127.5 - 1 if image.dtype == torch.uint8 else 2 * x - 1
        if self.crop is not None:
            top, left = (x.shape[-2] - self.crop) // 2, (x.shape[-1] - self.crop) // 2
            x = x[..., top : top + self.crop, left : left + self.crop]
        maps = self.maps(self.stages(self.stem(x.to(self.stem.weight.dtype))))
        height, width = maps.shape[-2:]
        p = maps.flatten(2).float().softmax(dim=-1).view(*maps.shape)
        u = torch.linspace(-1, 1, width, device=p.device)
        v = torch.linspace(-1, 1, height, device=p.device)
        return torch.cat([(p.sum(-2) * u).sum(-1), (p.sum(-1) * v).sum(-1)], dim=-1)
