"""A convolution and the normalisation after it as one affine map, with the derivatives of both kinds.

With running statistics the normalisation multiplies channels by s = gamma inv and adds beta - mean s, so that both
layers are one convolution of weight W = w s and bias B = beta + (b - mean) s, bilinear in (w, b) and s.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bsfast import ops
from bsfast.nn.layers import BatchNorm, Conv2d

Given = Callable[[Tensor], Tensor | None]  # from a parameter to its tangent, None if it is constant


def scale_and_bias(conv: Conv2d, norm: BatchNorm | None) -> tuple[Tensor | None, Tensor | None]:
    """What a convolution without bias is multiplied by, and what is added, to be both layers; None for 1 and 0."""
    if norm is None:
        return None, conv.bias
    scale, shift = norm.coefficients()
    return scale, shift if conv.bias is None else shift + conv.bias * scale


def geometry_of(conv: Conv2d) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a convolution."""
    own: Any = conv.settings
    return own.stride, own.padding, own.dilation, own.groups


def folds_exactly(conv: Conv2d) -> bool:
    """Whether the factors of :class:`Folded` are not rounded to 16 bits, nor convolved so by autocast."""
    return ops.taken_dtype(conv.weight).itemsize >= 4


class Folded:
    """Both layers at their present values; nothing records gradients.

    Args:
        conv: The convolution, for which :func:`bsfast.nn.joined.why_not_conv2d_norm` says nothing.
        norm: The normalisation with running statistics, or None.

    Attributes:
        weight: W, ``(M, C_out, C_in / groups, kH, kW)``.
        bias: B, ``(M, C_out)``, or None.
        scale: s, ``(M, C_out)``, or None.
    """

    def __init__(self, conv: Conv2d, norm: BatchNorm | None) -> None:
        self._conv, self._norm = (conv.weight, conv.bias), None if norm is None else (norm.weight, norm.bias)
        self._geometry = geometry_of(conv)
        with torch.no_grad():
            self.scale, bias = scale_and_bias(conv, norm)
            # Copies: a parameter's memory may be taken for another use while this is kept.
            self.bias = None if bias is None else bias.detach().clone()
            weight = conv.weight.detach()
            self.weight = weight.clone() if self.scale is None else weight * _by_channel(self.scale)
            if norm is not None and norm.running_mean is not None and norm.running_var is not None:
                own: Any = norm.settings
                self._inverse = (norm.running_var + own.eps).rsqrt()
                self._offset = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean

    def __call__(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        """act(conv(x) + bias + residual)."""
        return ops.folded_conv2d(x, self.weight, self.bias, self._geometry, residual, relu=relu)

    def tangent(
        self,
        x: tuple[Tensor, Tensor | None],
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Derivative of the value, zero where the mask is at most 0.

        Args:
            x: The input and its tangent.
            weight: Tangent of W.
            bias: Tangent of B.
            residual: Tangent of what is added.
            mask: The value, if it is a ReLU's; else None.

        Returns:
            Shape of the value.
        """
        if x[1] is None:
            weight = torch.zeros_like(self.weight) if weight is None else weight
            return ops.folded_conv2d(x[0], weight, bias, self._geometry, residual, mask=mask)
        if weight is not None:
            residual = ops.folded_conv2d(x[0], weight, None, self._geometry, residual)
        return ops.folded_conv2d(x[1], self.weight, bias, self._geometry, residual, mask=mask)

    def input_grad(
        self, grad: Tensor, x: Tensor, residual: Tensor | None, mask: Tensor | None, weight: Tensor | None = None
    ) -> Tensor:
        """Pull a gradient back to the input.

        Args:
            grad: Of the convolution's result.
            x: The input; only its shape and memory order matter.
            residual: What is added, or None.
            mask: Where it is at most 0, zero is stored; or None.
            weight: Other weights than W, such as their tangent.

        Returns:
            Shape of ``x``.
        """
        weight = self.weight if weight is None else weight
        return ops.folded_input_grad(grad, weight, x, self._geometry, residual, mask)

    def weight_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of W."""
        return ops.folded_weight_grad(x, grad, self.weight, self._geometry)

    def push(self, given: Given) -> tuple[Tensor | None, Tensor | None]:
        """Tangents of W and B, None where zero, from those of the layers' parameters."""
        weight, bias, gamma, beta = self._tangents(given)
        if self.scale is None:
            return weight, bias
        scale = None if gamma is None else gamma * self._inverse
        return (
            _total(_times(weight, self.scale), _times(self._conv[0].detach(), scale)),
            _total(beta, _times(bias, self.scale), _times(self._offset, scale)),
        )

    def pull(
        self, given: Given, grads: tuple[Tensor | None, Tensor | None], moved: tuple[Tensor | None, Tensor | None]
    ) -> list[tuple[Tensor, Tensor]]:
        """Tangents of the gradients of the layers' parameters.

        Args:
            given: Tangents of the parameters.
            grads: Gradients of W and B, None where zero.
            moved: Their tangents, likewise.

        Returns:
            Pairs of a parameter and the tangent of its gradient.
        """
        weight, bias = self._conv
        if self.scale is None:
            found = [(weight, moved[0]), (bias, moved[1])]
        else:
            tangents = self._tangents(given)
            scale = None if tangents[2] is None else tangents[2] * self._inverse
            of_scale = _total(
                _over_taps(weight.detach(), moved[0]), _over_taps(tangents[0], grads[0]),
                _times(moved[1], self._offset), _times(tangents[1], grads[1]),
            )  # fmt: skip
            gamma, beta = self._norm or (None, None)
            found = [
                (weight, _total(_times(moved[0], self.scale), _times(grads[0], scale))),
                (bias, _total(_times(moved[1], self.scale), _times(grads[1], scale))),
                (gamma, _times(of_scale, self._inverse)),
                (beta, moved[1]),
            ]
        return [(own, grad) for own, grad in found if own is not None and grad is not None]

    def _tangents(self, given: Given) -> list[Tensor | None]:
        return [None if own is None else given(own) for own in (*self._conv, *(self._norm or (None, None)))]


def _by_channel(scale: Tensor) -> Tensor:
    return scale[:, :, None, None, None]


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Product of weights or biases with a factor of each output channel."""
    if a is None or b is None:
        return None
    return a * (b if a.dim() == b.dim() else _by_channel(b))


def _over_taps(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else (a * b).sum((2, 3, 4))


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None
