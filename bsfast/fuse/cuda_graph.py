"""A network as CUDA graphs, for sizes at which starting kernels takes longer than running them."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from bsfast.fuse.joined import is_watched
from bsfast.nn.stacked import replaced


class Kind(NamedTuple):
    """What a graph was captured for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> "Kind":
        """Describe a tensor."""
        return cls(tuple(x.shape), x.dtype, x.device, x.requires_grad)

    def __str__(self) -> str:
        return f"{self.shape} of {self.dtype} on {self.device}{', requires_grad' if self.requires_grad else ''}"


class CudaGraph:
    """f(x) of a network for inputs of one kind, replayed; :meth:`Branched.cuda_graph` makes it and says how to use it.

    Args:
        net: The network.
        inputs: Tensors of the kind that it will be called with.
        per_branch: As the network takes it.
    """

    def __init__(self, net: nn.Module, inputs: Sequence[Tensor], per_branch: bool | Sequence[bool]) -> None:
        self.calls = 0
        self._kinds = [Kind.of(x) for x in inputs]
        self._device = inputs[0].device.type
        self._autocast = self._autocast_now()
        self._records = torch.is_grad_enabled()
        self._recorded: list[bool] = []  # of each result, whether it has gradients
        self._parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        with _unchanged(net, inputs[0]), torch.inference_mode(False), torch.set_grad_enabled(self._records):
            self._replay = self._capture(net, inputs, per_branch)
        self._tensors = list(_tensors_of(net))
        self._modes = [(path, module, module.training) for path, module in net.named_modules()]

    def __call__(self, *inputs: Tensor) -> Any:
        """Return f(x).

        Args:
            *inputs: As captured.

        Returns:
            As the network, in memory of its own.
        """
        self._check(inputs)
        self.calls += 1
        with torch.set_grad_enabled(self._records and torch.is_grad_enabled()):
            outputs = self._replay(*_Once.apply(self, *inputs, *self._parameters))  # type: ignore[no-untyped-call]
            leaves, form = pytree.tree_flatten(outputs)
            # Copies: the next replay writes over what it returned. It also says that all of it has gradients.
            pairs = zip(leaves, self._recorded, strict=True)
            own = [leaf.clone() if recorded else leaf.detach().clone() for leaf, recorded in pairs]
            return pytree.tree_unflatten(own, form)

    def _capture(self, net: nn.Module, inputs: Sequence[Tensor], per_branch: bool | Sequence[bool]) -> Any:
        enabled, dtype = self._autocast
        given = len(inputs)
        buffers = dict(net.named_buffers(remove_duplicate=False))
        # Aliases of the parameters: autograd binds a leaf to the stream that first uses it, which is not the user's.
        aliases = {id(own): own.detach().requires_grad_() for own in self._parameters}

        def forward(*tensors: Tensor) -> Any:
            with (
                replaced(net, lambda own: aliases.get(id(own), own)),
                torch.autocast(self._device, dtype, enabled, cache_enabled=False),
            ):
                outputs = net(*tensors[:given], per_branch=per_branch)
                for path, now in net.named_buffers(remove_duplicate=False):
                    if now is not buffers[path]:  # a replay runs no assignment
                        raise ValueError(
                            f"cuda_graph: buffers must be written in place, got another tensor as {path!r}"
                        )
            self._recorded = [leaf.requires_grad for leaf in pytree.tree_leaves(outputs)]
            return outputs

        own = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]  # every call writes into them
        with warnings.catch_warnings(), torch.autocast(self._device, enabled=False):  # else backward would be under it
            # The aliases outlive the warm-up, on another stream than the capture's; nothing else uses them.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream", UserWarning)
            try:
                return torch.cuda.make_graphed_callables(forward, (*own, *aliases.values()), allow_unused_input=True)
            except RuntimeError as error:
                raise RuntimeError(
                    f"cuda_graph: the network must not wait for the GPU, as .item() and copies to the CPU do, and must "
                    f"fit into memory; its capture failed: {error}"
                ) from error

    def _autocast_now(self) -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._kinds):
            raise TypeError(f"cuda_graph: as many inputs must come as captured, {len(self._kinds)}, got {len(inputs)}")
        for k, (x, kind) in enumerate(zip(inputs, self._kinds, strict=True)):
            if not isinstance(x, Tensor) or Kind.of(x) != kind:
                got = str(Kind.of(x)) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"cuda_graph: input {k} must be as captured, {kind}, got {got}; capture another graph")
        if (now := self._autocast_now()) != self._autocast and (now[0] or self._autocast[0]):
            was, got = (f"{dtype}" if enabled else "off" for enabled, dtype in (self._autocast, now))
            raise ValueError(f"cuda_graph: autocast must be as captured, {was}, got {got}; capture another graph")
        for path, module, training in self._modes:
            if module.training != training:
                raise ValueError(
                    f"cuda_graph: {path or 'the network'!r} must be in the mode that was captured, "
                    f"training={training}, got {module.training}; capture a graph for each mode"
                )
            _check_not_watched(path, module)
        for path, home, name, tensor, address, requires_grad in self._tensors:
            if home.get(name) is not tensor or tensor.data_ptr() != address or tensor.requires_grad != requires_grad:
                raise ValueError(
                    f"cuda_graph: parameters and buffers must be those that were captured, got another memory or "
                    f"requires_grad of {path!r}; capture another graph after moving, replacing or freezing them"
                )


class _Once(torch.autograd.Function):
    """Hands tensors to a graph; its backward pass refuses what the graph's memory no longer knows."""

    @staticmethod
    def forward(ctx: Any, graph: CudaGraph, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)  # so that torch refuses if one was changed, or the pass is a second one
        ctx.graph, ctx.call = graph, graph.calls
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        if ctx.call != ctx.graph.calls:
            raise RuntimeError(
                "cuda_graph: backward must be called once, before the next call, got a later one, which has written "
                "over what the graph keeps; capture a graph for each call of a step"
            )
        ctx.graph.calls += 1
        # Copies, in one kernel: .grad would share the memory of these (pytorch/pytorch#181723), which a replay changes.
        copies = iter(torch._foreach_mul([grad for grad in grads if grad is not None], 1))
        return None, *(None if grad is None else next(copies) for grad in grads)


def check_capture(net: nn.Module, inputs: Sequence[Any]) -> None:
    """Refuse what cannot be captured, or would not be replayed.

    Args:
        net: The network.
        inputs: Of a call.

    Raises:
        RuntimeError: If there is no GPU.
        TypeError: If an input is no tensor.
        ValueError: If something is on another device than a GPU, or a hook watches.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"cuda_graph: a CUDA device must be there, got none that torch {torch.__version__} can use; call the "
            "network itself"
        )
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"cuda_graph: inputs must be tensors, at least one, got {[type(x).__name__ for x in inputs]}")
    tensors = {f"input {k}": x for k, x in enumerate(inputs)} | {
        path: tensor for path, _, _, tensor, *_ in _tensors_of(net)
    }
    for name, tensor in tensors.items():
        if not tensor.is_cuda or tensor.device != inputs[0].device:
            raise ValueError(
                f"cuda_graph: inputs, parameters and buffers must be on one CUDA device, got {name} on "
                f"{tensor.device}; move them by .to('cuda')"
            )
    for path, module in net.named_modules():
        _check_not_watched(path, module)


def _check_not_watched(path: str, module: nn.Module) -> None:
    if is_watched(module):
        raise ValueError(f"cuda_graph: no module may have hooks, a replay calls none, got one on {path!r}")


def _tensors_of(net: nn.Module) -> Iterator[tuple[str, dict[str, Any], str, Tensor, int, bool]]:
    """Path, dictionary and name in it, tensor, address and requires_grad of each parameter and buffer."""
    for path, module in net.named_modules():
        homes: list[dict[str, Any]] = [module._parameters, module._buffers]
        for home in homes:
            for name, tensor in home.items():
                if tensor is not None:
                    dotted = f"{path}.{name}" if path else name
                    yield dotted, home, name, tensor, tensor.data_ptr(), tensor.requires_grad


@contextmanager
def _unchanged(net: nn.Module, x: Tensor) -> Iterator[None]:
    """Put buffers, such as running statistics, and random numbers back: capturing runs the network."""
    before = [(buffer, buffer.clone()) for buffer in net.buffers()]
    try:
        # A capture that fails leaves its own stream current.
        stream = torch.cuda.stream(torch.cuda.current_stream(x.device)) if x.is_cuda else nullcontext()
        with torch.cuda.device_of(x), stream, torch.random.fork_rng([x.device] if x.is_cuda else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
