"""Small networks, each with one rule or one feature of forward code: what the tests of fusing run through."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(NamedTuple):
    """How to make one branch, and what it takes.

    Attributes:
        make: Makes a branch.
        inputs: Shapes of one sample of each input.
        smallest: Smallest N that is legal in training.
        integers: Whether inputs are integers below 7.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((3, 7, 5),)
    smallest: int = 1
    integers: bool = False

    def draw(self, samples: int, *leading: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Draw inputs of shape ``(*leading, samples, ...)``."""
        shapes = [(*leading, samples, *shape) for shape in self.inputs]
        if self.integers:
            return [torch.randint(7, shape) for shape in shapes]
        return [torch.randn(shape, dtype=dtype) for shape in shapes]


class Code(nn.Module):
    """A convolution whose result goes through the forward code under test."""

    def __init__(self, code: Callable[["Code", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.other = nn.Conv2d(6, 6, 1)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.number = nn.Parameter(torch.randn(()))
        self.register_buffer("shift", torch.randn(6), persistent=False)
        self.table = torch.randn(5)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, self.conv(x))


class Squash(nn.Module):
    """Runs its layers on images; a tanh keeps losses of deep cases small."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layers(self.conv(x)))


class AdaIN(nn.Module):
    """Instance-normalised content with mean and scale from a style vector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(6)
        self.style = nn.Linear(4, 12)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        mean, scale = self.style(style).view(style.size(0), 12, 1, 1).chunk(2, 1)
        return self.norm(x) * (1 + scale) + mean


class Styled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.adain = AdaIN()

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return F.leaky_relu(self.adain(self.conv(x), style), 0.2)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.conv(x)
        return {"mean": y.mean((2, 3)), "parts": (y, [y.relu(), x])}


class Tied(nn.Module):
    """One parameter under two names, one module under two names and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.again = self.first
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.second(torch.tanh(self.norm(self.first(x))))))


class Text(nn.Module):
    """Embeddings of integers, positions as a plain tensor, attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.positions = torch.linspace(0, 1, 24).view(3, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        q, k, v = self.qkv(x).split(8, dim=-1)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1)
        return self.norm(x + weights @ v)


class Residual(nn.Module):
    """A basic block with in-place activations and a projected shortcut."""

    def __init__(self, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(5, 5, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(5)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 5, 1, stride, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out).mean(dim=(-2, -1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(105, 9), nn.SiLU(), nn.Linear(9, 4, bias=False))


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "uneven": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    "padded": {"padding": 1},
    "same": {"padding": "same"},
    "same-even": {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 1)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "replicate-same": {"padding": "same", "padding_mode": "replicate"},
    "groups": {"groups": 3, "padding": 1, "bias": False},
    "pointwise": {"kernel_size": 1},
}

NORMS = {
    "batchnorm": lambda: nn.BatchNorm2d(6),
    "batchnorm-cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "batchnorm-no-affine": lambda: nn.BatchNorm2d(6, affine=False, momentum=0.3),
    "batchnorm-no-stats": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "instancenorm": lambda: nn.InstanceNorm2d(6),
    "instancenorm-affine-stats": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "groupnorm": lambda: nn.GroupNorm(3, 6),
    "groupnorm-no-affine": lambda: nn.GroupNorm(2, 6, affine=False),
    "layernorm": lambda: nn.LayerNorm((6, 7, 5)),
    "layernorm-width": lambda: nn.LayerNorm(5, bias=False),
    "local-response": lambda: nn.LocalResponseNorm(3),
}

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(
        nn.Tanhshrink,
        nn.Softshrink,
        nn.Hardshrink,
        nn.Hardtanh,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.LogSigmoid,
        nn.Sigmoid,
    ),
    *(nn.Tanh, nn.PReLU, lambda: nn.PReLU(6), lambda: nn.Threshold(0.1, 2.0), lambda: nn.GELU("tanh")),
    *(lambda: nn.Softmax(1), lambda: nn.LogSoftmax(-1), lambda: nn.GLU(1), lambda: nn.ELU(inplace=True)),
    *(lambda: nn.Softmin(2), nn.Identity, nn.Dropout, lambda: nn.RReLU(0.2, 0.2)),
)

RESIZING = {
    "max-pool": lambda: nn.MaxPool2d(2),
    "max-pool-ceil": lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "avg-pool": lambda: nn.AvgPool2d((3, 2), stride=1, count_include_pad=False, padding=1),
    "adaptive-avg": lambda: nn.AdaptiveAvgPool2d((3, None)),
    "adaptive-max": lambda: nn.AdaptiveMaxPool2d(2),
    "lp-pool": lambda: nn.LPPool2d(2, 2),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest-size": lambda: nn.Upsample(size=(9, 4)),
    "bilinear": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
    "pixel-shuffle": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.PixelShuffle(2)),
    "pixel-unshuffle": lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.PixelUnshuffle(2)),
    "reflection-pad": lambda: nn.ReflectionPad2d((1, 2, 0, 1)),
    "constant-pad": lambda: nn.ConstantPad2d(1, 0.5),
    "flatten": lambda: nn.Flatten(2),
    "unflatten": lambda: nn.Unflatten(1, (2, 3)),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2),
    "unfold": lambda: nn.Unfold(3),
}


def _inplace_chain(_: Code, y: Tensor) -> Tensor:
    y += 1
    y.mul_(0.5).clamp_(min=-1)
    y -= y.mean()
    return F.relu_(y)


def _pool_indices(_: Code, y: Tensor) -> Tensor:
    pooled, indices = F.max_pool2d(y, 2, return_indices=True)
    return pooled * indices.to(y.dtype)


def _positional_inplace(_: Code, y: Tensor) -> Tensor:
    z = F.leaky_relu(y, 0.1, True)
    return z + y  # y was changed too


def _reuse_after_inplace(m: Code, y: Tensor) -> Tensor:
    z = m.other(y.clone())
    y *= m.shift[0]
    z += y
    return z.exp() + F.dropout(y, 0.5, False, True)


def _functional_layers(m: Code, y: Tensor) -> Tensor:
    y = F.conv2d(y, m.matrix[:, :, None, None], m.shift, padding="same")
    y = F.group_norm(F.instance_norm(y), 2, weight=m.shift)
    y = F.linear(y.movedim(1, -1), m.matrix, bias=m.scale.flatten())
    return F.layer_norm(y, (6,), m.matrix[0], eps=1e-3)


def _shapes(m: Code, y: Tensor) -> Tensor:
    n, c, *_ = (y.size(0), y.shape[1])
    flat = y.view(n, c, -1)
    again = flat.reshape(y.shape).flatten(start_dim=-2).permute(2, 0, 1)
    return again.transpose(0, -1).unsqueeze(-1).squeeze(-1) + y.numel() / (y.dim() * y.ndim)


CODE: dict[str, Callable[[Code, Tensor], Tensor]] = {
    "arithmetic": lambda _, y: 2 * y - 1 / (y * y + 3) + (1 - y) ** 2 / 4 + 2.0**y,
    "residual": lambda m, y: y + m.other(y).relu(),
    "inplace-chain": _inplace_chain,
    "inplace-positional": _positional_inplace,
    "inplace-reuse": _reuse_after_inplace,
    "functional-layers": _functional_layers,
    "shapes": _shapes,
    "broadcast-ranks": lambda m, y: y * m.scale + m.number + m.shift.view(6, 1, 1) * m.table,
    "parameters-only": lambda m, y: (m.scale * m.number).expand_as(y) + m.matrix.mean() * m.number,
    "zero-rank": lambda m, y: y.mean() * m.number + y.sum().unsqueeze(0).sum() / 200 + m.number.mean(),
    "cat": lambda m, y: torch.cat([y, m.other(y)], 1),
    "cat-negative": lambda m, y: torch.cat((y, m.scale.expand(y.size(0), 6, 7, 5)), dim=-2),
    "cat-axis": lambda m, y: torch.cat([y, m.other(y)], axis=1),
    "stack": lambda m, y: torch.stack([y, m.other(y)], dim=-1),
    "split": lambda _, y: torch.cat(y.split([1, 2, 3], 1)[::-1], 1) * y.chunk(3, dim=1)[1].mean(1, keepdim=True),
    "unbind": lambda _, y: y.unbind(1)[2] - torch.unbind(y, dim=-3)[0],
    "items": lambda _, y: y[:, 1:, ::2, -1] + y[..., None, 0, 0][:, :5] + y[:, [0, 2, 1, 3, 4]][:, :, 0, 0, None],
    "reductions": lambda _, y: y.mean((2, 3)) + y.sum(-1).amax(-1) + y.std((2, 3), correction=0) + y.var(dim=(-1, -2)),
    "keepdim": lambda _, y: y - y.mean(1, keepdim=True) + y.amax(dim=(1, 2), keepdim=True) + y.sum(2, True),
    "all-axes": lambda _, y: y.mean()
    + torch.sum(y) * y / 200
    + y.norm()
    + y.sum(dim=()) / 200
    + y.sum((0, -1)).sum() / 200,
    "extrema": lambda _, y: y.max(1).values + y.min(dim=1)[0] + torch.max(y, 1)[0] + y.max() + y.argmax(1),
    "cumulative": lambda _, y: y.cumsum(1) + torch.cumprod(y, dim=-1) + y.flip(1) + y.roll(1, 2),
    "where": lambda m, y: torch.where(y > m.scale, y, m.number) + torch.where(y.isnan(), 0.0, -y),
    "comparisons": lambda _, y: (y > 0).to(y.dtype) + (y <= 0.5).double() * y + ((y > 0) & ~(y < 1)).type_as(y),
    "masks": lambda _, y: y.masked_fill(y < 0, 0.5) + torch.hypot(y, y.detach()),
    "softmax": lambda _, y: torch.softmax(y, 1) + F.log_softmax(y, -1) + y.softmax(dim=2) + F.softmin(y, dim=3),
    "matmul": lambda m, y: m.matrix @ y.flatten(2) + torch.einsum("ij,njw->niw", m.matrix, y.flatten(2)),
    "gram": lambda _, y: torch.bmm(y.flatten(2), y.flatten(2).mT),
    "batchnorm-functional": lambda m, y: F.batch_norm(y, None, None, m.scale.flatten(), m.shift, training=True),
    "dropout-off": lambda _, y: F.dropout2d(F.dropout(y, 0.3, training=False), training=False),
    "pool-interpolate": lambda _, y: F.interpolate(F.max_pool2d(y, 2, 1, padding=1), size=y.shape[2:], mode="nearest"),
    "pool-indices": _pool_indices,
    "pad": lambda _, y: F.pad(y, (1, 2)).sum(-1) + F.pad(y, [1, 1, 1, 1], mode="reflect")[..., 1:-1, 0],
    "pad-all": lambda _, y: F.pad(y, (0, 0, 0, 0, 1, 1, 0, 0), value=2.0),
    "normalize": lambda _, y: F.normalize(y, dim=1) + F.cosine_similarity(y, y.flip(1), dim=1).unsqueeze(1),
    "clone-detach": lambda _, y: y.clone().add_(1) * y.detach() + y.contiguous(memory_format=torch.channels_last),
    "memory-formats": lambda _, y: y.clone(memory_format=torch.contiguous_format).to(memory_format=torch.channels_last),
    "view-as": lambda m, y: y.flatten(1).view_as(y) + y.reshape(-1).view(y.size()) + m.shift.expand(5, 6).mT.sum(),
    "squeeze": lambda m, y: y[:, :1].squeeze(1) * m.scale.squeeze()[0] + y.unsqueeze(-5).squeeze(0).sum(1),
    "plain-tensor": lambda m, y: y * m.table + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) + m.table[0],
    "clamp-tensor": lambda m, y: y.clamp(min=m.number, max=m.number + 1) + torch.clamp(y, -0.5, 0.5),
    "keyword-input": lambda m, y: F.linear(input=y, weight=m.matrix[:5, :5].clone()) + F.relu(input=y),
    "new-tensors": lambda m, y: y + torch.arange(y.size(3)) + y.new_ones(7, 1) * m.number,
    "positive": lambda _, y: (+y).add(1) - (-y).abs(),
}

OTHERS = {
    "mlp": Network(_mlp),
    "residual-block": Network(Residual, smallest=2),
    "adain": Network(Styled, ((3, 7, 5), (4,))),
    "two-outputs": Network(TwoOutputs),
    "tied": Network(Tied, ((5,),), smallest=2),
    "text": Network(Text, ((3,),), integers=True),
    "batchnorm1d": Network(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), ((5,),), smallest=2),
    "batchnorm1d-sequence": Network(lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(3, 2)), ((5, 3),)),
    "sequence-linear": Network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4)), ((5, 3),)),
    "conv1d": Network(lambda: nn.Sequential(nn.Conv1d(5, 4, 3, padding=1), nn.AvgPool1d(2)), ((5, 6),)),
    "conv3d": Network(lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), ((2, 3, 4, 3),)),
    "one-channel": Network(lambda: nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.PReLU()), ((1, 6, 5),)),
    "first-norm": Network(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), ((3, 7, 5),)),
}

NETWORKS: dict[str, Network] = {
    **{f"conv-{k}": Network(lambda v=v: nn.Conv2d(**{"in_channels": 3, "out_channels": 6, "kernel_size": 3} | v))
       for k, v in CONVOLUTIONS.items()},
    **{f"norm-{k}": Network(lambda v=v: Squash(v())) for k, v in NORMS.items()},
    **{f"activation-{i}-{make().__class__.__name__}": Network(lambda make=make: Squash(make()))
       for i, make in enumerate(ACTIVATIONS)},
    **{f"resize-{k}": Network(lambda v=v: Squash(v())) for k, v in RESIZING.items()},
    **{f"code-{k}": Network(lambda v=v: Code(v)) for k, v in CODE.items()},
    **OTHERS,
}  # fmt: skip
