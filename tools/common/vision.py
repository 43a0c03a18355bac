"""Models of torch and torchvision alone, with a loss, for checks on a device without a toolbox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


class VisionModel(nn.Module):
    """A network with its loss, which is called as MMEngine's models are.

    Args:
        network: The network.
        loss: Function of its output and the targets.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'loss') -> Any:
        return dict(loss=self._loss(self.network(inputs), targets))

    @staticmethod
    def parse_losses(losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses, and the losses."""
        return losses['loss'], losses


class WindowMSA(nn.Module):
    """Attention within windows, with a relative position bias."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.scale, self.window_size = heads, (width // heads) ** -0.5, side
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.bias = nn.Parameter(torch.zeros(heads, side**2, side**2))

    def forward(self, x: Tensor) -> Any:
        """Attention of windows (windows, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.softmax(self.scale * q @ k.mT + self.bias)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """Attention within windows of `side` x `side` tokens, then two linear layers."""

    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.side, self.shift = side, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowMSA(width, heads, side)
        wide = 4 * width
        self.ffn = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        """Block on maps (batch, height, width, channels)."""
        n, h, w, c = x.shape
        s = self.side
        shifted = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        windows = shifted.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        mixed = self.attn(windows).view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(x.shape)
        x = x + torch.roll(mixed, (self.shift, self.shift), (1, 2))
        return x + self.ffn(self.norm2(x))


class Swin(nn.Module):
    """Swin Transformer in the sizes of Swin-T; shifted windows wrap around without a mask."""

    def __init__(
        self,
        width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        side: int = 7,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        stages: list[nn.Module] = []
        for k, depth in enumerate(depths):
            channels = width * 2**k
            blocks = [
                SwinBlock(channels, channels // 32, side, side // 2 * (j % 2)) for j in range(depth)
            ]
            stages += [*([Merge(channels // 2)] if k else []), *blocks]
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Any:
        x = self.stages(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class Merge(nn.Module):
    """Four neighbouring tokens as one, of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Any:
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


def classifier(name: str) -> VisionModel:
    """'resnet18', 'resnet50', 'swin-t' or 'swin-mini', with random weights."""
    networks: dict[str, Callable[[], nn.Module]] = {
        'resnet18': resnet18,
        'resnet50': resnet50,
        'swin-t': Swin,
        'swin-mini': lambda: Swin(32, (2, 2), 4, 10),
    }
    return VisionModel(networks[name](), F.cross_entropy)


def feature_pyramid(backbone: str = 'resnet50') -> VisionModel:
    """ResNet with a feature pyramid, whose levels shall be zero."""
    network = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    return VisionModel(network, lambda levels, _: sum(v.square().mean() for v in levels.values()))


def batch_of(images: int, size: tuple[int, int], classes: int, seed: int) -> dict[str, Tensor]:
    """Noise with random labels."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        inputs=torch.randn(images, 3, *size, generator=generator),
        targets=torch.randint(classes, (images,), generator=generator),
    )
