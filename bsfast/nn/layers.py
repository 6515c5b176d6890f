"""Branched layers: each the M-branch form of the ``torch.nn`` module of the same name.

They take ``(M, N, ...)``; with ``shared=True``, those that ``takes_shared`` take one ``(N, ...)`` for all branches.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bsfast import ops
from bsfast.nn import functional
from bsfast.nn.stacked import StackedModule


class Conv2d(StackedModule):
    """M ``torch.nn.Conv2d``; weight ``(M, C_out, C_in / groups, kH, kW)``, bias ``(M, C_out)``."""

    takes_shared = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, *, shared: bool = False) -> Tensor:
        """Convolve ``(M, N, C_in, H, W)``, or one ``(N, C_in, H, W)`` with the weights of every branch."""
        own: nn.Conv2d = self.settings  # type: ignore[assignment]
        padding = own.padding
        if own.padding_mode != "zeros":
            x = functional.pad(x, own._reversed_padding_repeated_twice, own.padding_mode)
            padding = 0  # type: ignore[assignment]
        return functional.conv2d(
            x, self.weight, self.bias, own.stride, padding, own.dilation, own.groups, shared=shared
        )


class Linear(StackedModule):
    """M ``torch.nn.Linear``; weight ``(M, out_features, in_features)``, bias ``(M, out_features)``."""

    takes_shared = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, *, shared: bool = False) -> Tensor:
        """Map ``(M, N, ..., in_features)``, or one ``(N, ..., in_features)`` with the weights of every branch."""
        return functional.linear(x, self.weight, self.bias, shared=shared)


class BatchNorm(StackedModule):
    """M ``torch.nn.BatchNorm1d``, ``2d`` or ``3d``; every branch has its own statistics, ``(M, C)``."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    @property
    def uses_batch(self) -> bool:
        """Whether it normalises with the statistics of the batch."""
        return self.training or self.running_mean is None

    def forward(
        self,
        x: Tensor,
        *,
        residual: Tensor | None = None,
        relu: bool = False,
        moments: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Normalise ``(M, N, C, ...)`` over samples and space; then add ``residual`` and apply a ReLU, where asked."""
        own: nn.BatchNorm2d = self.settings  # type: ignore[assignment]
        own._check_input_dim(x[0])
        momentum = own.momentum
        tracks = self.training and own.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # Whether F.batch_norm sees the running statistics.
        keep = (tracks and momentum is not None) or not self.uses_batch
        y = functional.batch_norm(
            x,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            self.uses_batch,
            0.0 if momentum is None else momentum,
            own.eps,
            residual=residual,
            relu=relu,
            moments=moments,
        )
        if tracks and momentum is None:
            axes = [axis for axis in range(1, x.dim()) if axis != 2]
            variance, mean = torch.var_mean(x.detach(), dim=axes, correction=0)
            self._average(mean, variance, x[0, :, 0].numel())
        return y

    def track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics by a batch that was normalised elsewhere.

        Args:
            mean: Means of its channels, ``(M, C)``.
            variance: Their variances, divided by ``count``.
            count: Elements of a channel.
        """
        own: nn.BatchNorm2d = self.settings  # type: ignore[assignment]
        if not (self.training and own.track_running_stats):
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if own.momentum is None:
            self._average(mean, variance, count)
        else:
            functional.update_statistics(self.running_mean, self.running_var, mean, variance, count, own.momentum)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, each ``(M, C)``, of the normalisation with running statistics: y = scale x + shift.

        Returns:
            The two.

        Raises:
            ValueError: If there are no running statistics.
        """
        own: nn.BatchNorm2d = self.settings  # type: ignore[assignment]
        if self.running_mean is None or self.running_var is None:
            raise ValueError("BatchNorm.coefficients: running statistics must be there, got None")
        scale = (self.running_var.to(ops.statistics_dtype(self.running_var.dtype)) + own.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        return scale, shift if self.bias is None else shift + self.bias

    def _average(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Cumulative averages (momentum=None), whose factor 1 / batches may differ between branches."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        factor = (1.0 / self.num_batches_tracked.double()).to(self.running_mean.dtype).unsqueeze(1)
        factor = factor.expand_as(self.running_mean)
        self.running_mean.lerp_(mean.to(factor.dtype), factor)
        self.running_var.lerp_((variance * (count / max(count - 1, 1))).to(factor.dtype), factor)


class InstanceNorm2d(StackedModule):
    """M ``torch.nn.InstanceNorm2d``."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(M, N, C, H, W)`` over space."""
        own: nn.InstanceNorm2d = self.settings  # type: ignore[assignment]
        own._check_input_dim(x[0])
        if x.dim() == 4:  # one sample, without an axis for it
            return self.forward(x.unsqueeze(1)).squeeze(1)
        if x.shape[2] != own.num_features and own.affine:
            raise ValueError(f"InstanceNorm2d: x must have C={own.num_features} channels, got {tuple(x.shape)}")
        use_input = self.training or not own.track_running_stats
        momentum = 0.0 if own.momentum is None else own.momentum
        return functional.instance_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use_input, momentum, own.eps
        )


class GroupNorm(StackedModule):
    """M ``torch.nn.GroupNorm``."""

    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(M, N, C, ...)`` over groups of channels and space."""
        own: nn.GroupNorm = self.settings  # type: ignore[assignment]
        return functional.group_norm(x, own.num_groups, self.weight, self.bias, own.eps)


class LayerNorm(StackedModule):
    """M ``torch.nn.LayerNorm``."""

    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(M, N, ...)`` over the last axes."""
        own: nn.LayerNorm = self.settings  # type: ignore[assignment]
        return functional.layer_norm(x, own.normalized_shape, self.weight, self.bias, own.eps)


class PReLU(StackedModule):
    """M ``torch.nn.PReLU``, each with its own slopes."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(M, N, C, ...)``."""
        return functional.prelu(x, self.weight)


def copy_first(branches: Sequence[nn.Module]) -> nn.Module:
    """Make M modules one that treats all elements alike, such as Dropout: M branches are just more elements.

    Args:
        branches: Equal modules without parameters.

    Returns:
        A copy of the first, never in-place: an input may be shared by the branches.
    """
    module = copy.deepcopy(branches[0])
    if hasattr(module, "inplace"):
        setattr(module, "inplace", False)  # noqa: B010 (torch declares no such attribute)
    return module


class _Samplewise(nn.Module):
    """A module without parameters that treats all samples alike: M branches are just more samples."""

    @classmethod
    def from_branches(cls, branches: Sequence[nn.Module]) -> nn.Module:
        """Copy the first branch's module, which the others equal."""
        module = copy_first(branches)
        module.__class__ = cls
        return module

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(M, N, ...)``."""
        return functional.over_samples(super().forward, x)


class Dropout1d(_Samplewise, nn.Dropout1d):
    """M ``torch.nn.Dropout1d``; channels are dropped in each branch by itself."""


class Dropout2d(_Samplewise, nn.Dropout2d):
    """M ``torch.nn.Dropout2d``; channels are dropped in each branch by itself."""


class Dropout3d(_Samplewise, nn.Dropout3d):
    """M ``torch.nn.Dropout3d``; channels are dropped in each branch by itself."""


class FeatureAlphaDropout(_Samplewise, nn.FeatureAlphaDropout):
    """M ``torch.nn.FeatureAlphaDropout``; channels are dropped in each branch by itself."""
