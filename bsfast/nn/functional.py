"""Layers as functions of M branches: activations ``(M, N, C, ...)``, parameters with axis 0 = M.

Each is equivalent to ``torch.stack`` of the ``torch.nn.functional`` function of the same name over branches, and takes
the same settings. An input shared by all branches, without the M axis, is allowed where ``shared`` says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from bsfast import ops
from bsfast.layout import is_batch_last

Size = int | Sequence[int]
to_batch_last, taken_dtype = ops.to_batch_last, ops.taken_dtype  # of a network's inputs, too


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    shared: bool = False,
) -> Tensor:
    """``F.conv2d`` of each branch; ``x`` is ``(M, N, C, H, W)``, or ``(N, C, H, W)`` if shared; N may be absent."""
    batch_axis = 0 if shared else 1
    unbatched = x.dim() == batch_axis + 3
    if not unbatched and x.dim() != batch_axis + 4:
        raise ValueError(
            f"conv2d: x must have shape (N, C_in, H, W) or (C_in, H, W)"
            f"{'' if shared else ' after the branch axis'}, got {tuple(x.shape)}"
        )
    if unbatched:
        x = x.unsqueeze(batch_axis)
    if isinstance(padding, str):
        x, padding = pad_by_name(x, padding, weight, stride, dilation)
    y = ops.conv2d(
        x, weight, stride=_as_pair(stride), padding=_as_pair(padding), dilation=_as_pair(dilation), groups=groups
    )
    if bias is not None:
        y = y + bias[:, None, :, None, None].to(y.dtype)
    return y.squeeze(1) if unbatched else y


def _as_pair(value: Size) -> int | tuple[int, int]:
    return value if isinstance(value, int) else (value[0], value[-1])


def pad_by_name(x: Tensor, padding: str, weight: Tensor, stride: Size, dilation: Size) -> tuple[Tensor, Size]:
    """Pad as ``padding="same"`` or ``"valid"`` says; returns the padded input and what is left to pad."""
    if padding == "valid":
        return x, 0
    if padding != "same" or _as_pair(stride) not in {1, (1, 1)}:
        raise ValueError(
            f"conv2d: padding must be 'valid', 'same' with stride 1, an int or a pair, got {padding!r} with {stride=}"
        )
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    total = [d * (k - 1) for d, k in zip(dilations, weight.shape[-2:], strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, (total[0] // 2, total[1] // 2)
    return pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2), "constant"), 0


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """``F.pad`` of images ``(M, N, C, H, W)``, ``(N, C, H, W)`` or ``(C, H, W)``, in any mode."""
    if x.dim() < 5 and not is_batch_last(x):
        return F.pad(x, list(padding), mode)
    padded: Tensor = over_planes(lambda t: F.pad(t, list(padding), mode), x)
    return padded


def adaptive_avg_pool2d(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """``F.adaptive_avg_pool2d`` of each branch; ``x`` is ``(M, N, C, H, W)`` or ``(M, C, H, W)``."""
    if x.dim() == 5 and is_batch_last(x) and output_size in (1, (1, 1), [1, 1]):
        # Over these axes of this view the mean's gradient is batch-last too; pooling's would be converted to it.
        return x.movedim(1, -1).mean((2, 3), keepdim=True).movedim(-1, 1)
    over = over_planes if x.dim() == 5 else over_samples
    pooled: Tensor = over(lambda t: F.adaptive_avg_pool2d(t, output_size), x)  # type: ignore[arg-type]
    return pooled


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, shared: bool = False) -> Tensor:
    """``F.linear`` of each branch; ``x`` is ``(M, N, ..., in_features)``, or without M if shared."""
    branches, out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"linear: x must have in_features={in_features} on its last axis, got shape {tuple(x.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"linear: x must have weight's dtype {weight.dtype}, got {x.dtype}")
    if shared:  # one product for all branches
        y = F.linear(x, weight.flatten(0, 1)).unflatten(-1, (branches, out_features)).movedim(-2, 0)
        return y if bias is None else y + bias.view(branches, *[1] * (x.dim() - 1), out_features).to(y.dtype)
    rows = x.reshape(branches, -1, in_features)
    if x.dim() == 3 and x.stride(1) == 1 and x.stride(2) > 1:  # flattened batch-last images: so are their gradients
        columns = rows.mT
        y = torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, columns)
        return y.mT
    y = torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
    return y.view(*x.shape[:-1], out_features)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    moments: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``F.batch_norm`` of each branch; then ``residual``, of x's shape, is added, and a ReLU applied if ``relu``."""
    for given in (weight, running_mean):
        if given is not None and x.shape[2] != given.shape[1]:
            raise ValueError(f"batch_norm: x must have C={given.shape[1]} channels, got {tuple(x.shape)}")
    # moments: mean and variance (divided by the number of elements) of the batch, if they are known.
    own = training and ops.plan_batch_norm(x, weight, bias, residual).algorithm == "native" and ops.has_memory(x)
    if own and (count := x[0, :, 0].numel()) > 1:  # of one element torch complains
        y, mean, variance = ops.batch_norm(x, weight, bias, eps=eps, residual=residual, relu=relu, moments=moments)
        update_statistics(running_mean, running_var, mean, variance, count, momentum)
        return y
    y = _stock_batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def _stock_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    flat = [None if t is None else t.reshape(-1) for t in (weight, bias)]
    running = [None if t is None else t.view(-1) for t in (running_mean, running_var)]  # views: updated in place
    arguments: tuple[Any, ...] = (*running, *flat, *rest)
    if x.dim() == 5 and is_batch_last(x):  # [M][C][H][W][N]: every channel of every branch is one contiguous row
        rows = x.movedim(1, -1)
        merged = rows.reshape(1, -1, rows[0, 0].numel())
        return F.batch_norm(merged, *arguments).view(rows.shape).movedim(-1, 1)
    y = F.batch_norm(x.transpose(0, 1).flatten(1, 2), *arguments)
    return y.unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)


def update_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move running statistics ``(M, C)``, if there are any, towards those of a batch, in place.

    Args:
        running_mean: Running means.
        running_var: Running unbiased variances.
        mean: Means of the batch.
        variance: Its variances, divided by ``count``.
        count: Elements of a channel.
        momentum: Weight of the batch.
    """
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    negative_slope: float = 1.0,
) -> Tensor:
    """``F.instance_norm`` of each branch, then a leaky ReLU: statistics over space, of each sample and channel."""
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError("instance_norm: running statistics must be given when use_input_stats is False, got None")
        y = affine(x, running_var.add(eps).rsqrt(), None, -running_mean)
        return _leaky_relu(affine(y, weight, bias), negative_slope)
    if own := _own_sample_norm(x, x.shape[2], weight, bias, eps, negative_slope):
        y, mean, variance = own
        count = x[0, 0, 0].numel()
        mean, variance = mean.mean(1), variance.mean(1) * (count / (count - 1))
    else:
        y = affine(over_samples(lambda t: F.instance_norm(t, eps=eps), x), weight, bias)
        y = _leaky_relu(y, negative_slope)
        if running_mean is not None:
            with torch.no_grad():
                variance, mean = torch.var_mean(x.flatten(3).to(running_mean.dtype), dim=3)
                mean, variance = mean.mean(1), variance.mean(1)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(variance.to(running_var.dtype), momentum)
    return y


def adaptive_instance_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, *, negative_slope: float = 1.0
) -> Tensor:
    """Instance normalisation whose affine map each sample has of its own, then a leaky ReLU.

    Huang & Belongie (2017), Arbitrary style transfer in real-time with adaptive instance normalization; the form with
    1 + gamma is StarGAN v2's (Choi et al., 2020).

    Args:
        x: Shape ``(M, N, C, H, W)``.
        gamma: Scale less 1, shape ``(M, N, C)``.
        beta: Shift, shape ``(M, N, C)``.
        eps: Added to the variance.
        negative_slope: What negative results are multiplied by: 0 for ReLU, 1 for no activation.

    Returns:
        act((1 + gamma) (x - mean) / sigma + beta), shape of ``x``.

    Raises:
        ValueError: If a shape does not fit.
    """
    for name, given in (("gamma", gamma), ("beta", beta)):
        if x.dim() != 5 or given.shape != x.shape[:3]:
            raise ValueError(
                f"adaptive_instance_norm: x must have shape (M, N, C, H, W) and {name} (M, N, C), got "
                f"{tuple(x.shape)} and {tuple(given.shape)}"
            )
    scale = 1 + gamma
    if own := _own_sample_norm(x, x.shape[2], scale, beta, eps, negative_slope):
        return own[0]
    y = over_samples(lambda t: F.instance_norm(t, eps=eps), x)
    return _leaky_relu(y * scale[..., None, None] + beta[..., None, None], negative_slope)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    negative_slope: float = 1.0,
) -> Tensor:
    """``F.group_norm`` of each branch, then a leaky ReLU."""
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:
        x = x.float()  # as stock PyTorch does
    if own := _own_sample_norm(x, num_groups, weight, bias, eps, negative_slope):
        return own[0]
    y = affine(over_samples(lambda t: F.group_norm(t, num_groups, eps=eps), x), weight, bias)
    return _leaky_relu(y, negative_slope)


def _own_sample_norm(
    x: Tensor, num_groups: int, scale: Tensor | None, shift: Tensor | None, eps: float, negative_slope: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Run our kernel where it applies; what is wrong, and of one element, stock operators refuse."""
    if ops.plan_sample_norm(x, scale, shift).algorithm != "native":
        return None
    if num_groups < 1 or x.shape[2] % num_groups or x[0, 0].numel() <= num_groups or negative_slope < 0:
        return None
    shapes = {x.shape[:3], (x.shape[0], x.shape[2])}
    if any(t is not None and t.shape not in shapes for t in (scale, shift)):
        return None
    return ops.sample_norm(x, scale, shift, num_groups=num_groups, eps=eps, negative_slope=negative_slope)


def _leaky_relu(x: Tensor, negative_slope: float) -> Tensor:
    return x if negative_slope == 1 else F.leaky_relu(x, negative_slope)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm`` of each branch: statistics over the last axes."""
    if x.dim() <= len(normalized_shape):
        raise ValueError(f"layer_norm: x must have {len(normalized_shape)} axes after M, got shape {tuple(x.shape)}")
    y = F.layer_norm(x, tuple(normalized_shape), eps=eps)
    free = (1,) * (x.dim() - 1 - len(normalized_shape))
    if weight is not None:
        y = y * _as_activation(weight.view(weight.shape[0], *free, *normalized_shape), y)
    if bias is not None:
        y = y + _as_activation(bias.view(bias.shape[0], *free, *normalized_shape), y)
    return y


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """``F.prelu`` of each branch; ``weight`` is ``(M,)``, ``(M, 1)`` or ``(M, C)``."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in {x.dtype, weight.dtype}:
        lower = torch.get_autocast_dtype(device)
        x, weight = x.to(lower), weight.to(lower)
    if x.dtype != weight.dtype:
        raise TypeError(f"prelu: x must have weight's dtype {weight.dtype}, got {x.dtype}")
    one_slope = weight.numel() == weight.shape[0]
    slopes = weight.view(weight.shape[0], *[1] * (x.dim() - 1)) if one_slope else per_channel(weight, x)
    return torch.where(x > 0, x, x * slopes)


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, before: Tensor | None = None) -> Tensor:
    """(x + before) * scale + shift with ``(M, C)`` coefficients, each optional."""
    if before is not None:
        x = x + per_channel(before, x)
    if scale is not None:
        x = x * per_channel(scale, x)
    return x if shift is None else x + per_channel(shift, x)


def _as_activation(values: Tensor, x: Tensor) -> Tensor:
    """Cast coefficients to the activation's dtype; as in stock PyTorch, only 16-bit activations may have others."""
    if values.dtype == x.dtype or (values.dtype == torch.float32 and x.dtype.itemsize == 2):
        return values.to(x.dtype)
    raise TypeError(f"x must have the dtype of the parameters, {values.dtype}, got {x.dtype}")


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View ``(M, C)`` so that it broadcasts against x, ``(M, N, C, ...)``."""
    if x.dim() < 3 or x.shape[2] != values.shape[1]:
        raise ValueError(f"x must have C={values.shape[1]} channels on axis 2 of (M, N, C, ...), got {tuple(x.shape)}")
    return _as_activation(values.view(values.shape[0], 1, values.shape[1], *[1] * (x.dim() - 3)), x)


def embedding(
    x: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``F.embedding`` of each branch; ``x`` holds row numbers, ``(M, ...)``, ``weight`` is ``(M, rows, features)``."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise ValueError(
            f"embedding: max_norm, scale_grad_by_freq and sparse must be unset, got {max_norm=}, {norm_type=}, "
            f"{scale_grad_by_freq=}, {sparse=}"
        )
    branches, rows, _ = weight.shape
    if padding_idx is not None:  # this row gets no gradient
        padding_idx %= rows
        fixed = weight[:, padding_idx : padding_idx + 1].detach()
        weight = torch.cat([weight[:, :padding_idx], fixed, weight[:, padding_idx + 1 :]], 1)
    first = torch.arange(branches, device=x.device).view(branches, *[1] * (x.dim() - 1)) * rows
    inside = (x >= 0) & (x < rows)  # a number beyond the rows must fail, not read another branch's
    return F.embedding(torch.where(inside, x + first, -1), weight.flatten(0, 1))


def over_samples(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Apply a function that treats samples alike to ``(M, N, ...)`` as M*N samples; keeps the memory order."""

    def split(y: Tensor) -> Tensor:
        y = y.unflatten(0, x.shape[:2])
        return to_batch_last(y) if x.dim() == 5 and y.dim() == 5 and is_batch_last(x) else y

    return pytree.tree_map(split, function(x.flatten(0, 1)))


def over_planes(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Apply a function that treats every channel of every sample alike, such as pooling; keeps the memory order.

    Args:
        function: Takes images ``(samples, channels, H, W)`` and returns one or several of them, of other sizes.
        x: Shape ``(M, N, C, H, W)``, or a batch-last ``(N, C, H, W)`` that the branches share.

    Returns:
        What ``function`` returns, for the images of every branch.
    """
    if not is_batch_last(x):
        return over_samples(function, x)
    # [M][C][H][W][N] is the channels_last order of M*C samples that have N channels.
    planes = x.transpose(-4, -3)
    results = function(planes.flatten(0, -4))
    split = planes.shape[:-3]
    return pytree.tree_map(lambda y: to_batch_last(y.unflatten(0, split).transpose(-4, -3)), results)
