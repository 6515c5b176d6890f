"""The classifier's branch: ResNet-18 for 32 x 32 images with few channels, in plain ``torch.nn``.

Source: He et al. (2016), Deep residual learning, in the CIFAR form of github.com/kuangliu/pytorch-cifar (3 x 3 stem, no
max-pooling); widths chosen to match the paper's 0.08e6 parameters a branch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

WIDTHS: dict[str, tuple[int, int, int, int]] = {
    "paper": (8, 16, 32, 32),
    "scaled": (5, 11, 22, 43),
    "cpu-small": (4, 8, 16, 16),
}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, added to a shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SlimResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: a stem, four stages of two blocks, average pooling and a linear readout.

    Args:
        widths: Channels of the four stages; the stem has those of the first.
        num_classes: Number of logits.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[0], 1)
        self.layer2 = _stage(widths[0], widths[1], 2)
        self.layer3 = _stage(widths[1], widths[2], 2)
        self.layer4 = _stage(widths[2], widths[3], 2)
        self.pool = nn.AvgPool2d(4)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, 32, 32)`` to logits ``(N, num_classes)``."""
        return self.from_stem(self.conv1(x))

    def from_stem(self, stem: Tensor) -> Tensor:
        """Map the first convolution's output ``(N, widths[0], 32, 32)`` to logits ``(N, num_classes)``."""
        y = self.relu(self.bn1(stem))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.linear(self.flatten(self.pool(y)))


def make_branch(widths: Sequence[int], num_classes: int = 10) -> SlimResNet18:
    """Make one branch with PyTorch's default initialisation.

    Args:
        widths: Channels of the four stages, such as ``WIDTHS["paper"]``.
        num_classes: Number of logits.

    Returns:
        A new module.

    Raises:
        ValueError: If there are not four positive widths or no class.

    Example:
        >>> sum(parameter.numel() for parameter in make_branch(WIDTHS["paper"]).parameters())
        82578
    """
    if len(widths) != 4 or min(widths) < 1:
        raise ValueError(f"make_branch: widths must be 4 positive integers, got {tuple(widths)}")
    if num_classes < 1:
        raise ValueError(f"make_branch: num_classes must be at least 1, got {num_classes}")
    return SlimResNet18(widths, num_classes)


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1))
