"""Stacking the tensors of M modules along a new axis 0, and taking them apart again, bit for bit."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class Container(nn.Module):
    """A node of the module tree that only holds names: the code of its module is part of the whole network's."""

    _skeletons: tuple[nn.Module, ...] = ()  # the first branch's module, where it is known

    def train(self, mode: bool = True) -> "Container":
        """Set the modes that the module's own ``train`` sets."""
        return train_as(self, self._skeletons[0], mode) if self._skeletons else super().train(mode)

    def _refuse_hook(self, register: str) -> NoReturn:
        name = type(self._skeletons[0] if self._skeletons else self).__name__
        raise ValueError(
            f"{register}: hooks must be on the network or a fused layer, got {name}, which is traced through and "
            "would never call them"
        )

    def register_forward_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: it would never be called."""
        self._refuse_hook("register_forward_hook")

    def register_forward_pre_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: it would never be called."""
        self._refuse_hook("register_forward_pre_hook")

    def register_full_backward_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: it would never be called."""
        self._refuse_hook("register_full_backward_hook")

    def register_full_backward_pre_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: it would never be called."""
        self._refuse_hook("register_full_backward_pre_hook")

    def register_backward_hook(self, *_: Any, **__: Any) -> Any:
        """Refuse: it would never be called."""
        self._refuse_hook("register_backward_hook")


CALL_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by dotted name, tied ones under each of their names."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def copy_with(module: nn.Module, replace: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Deep-copy a module with its tensors replaced; ties between tensors and all other attributes are kept.

    Args:
        module: Any module.
        replace: (dotted name, tensor) -> tensor of the copy; called once for each distinct tensor.

    Returns:
        The copy.
    """
    memo: dict[int, Any] = {}
    for name, tensor in tensors_of(module).items():
        if id(tensor) in memo:
            continue
        new = replace(name, tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new.detach()
    return copy.deepcopy(module, memo)


@contextmanager
def replaced(root: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put other tensors in place of a module's parameters and buffers for a while, ties and shared modules included.

    (``torch.func.functional_call`` does not put back the tensors of a module that is registered under two names.)

    Args:
        root: Module.
        replace: Tensor -> what stands in for it; called once for each distinct tensor.

    Yields:
        None.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    memo: dict[int, Tensor] = {}
    try:
        for module in root.modules():
            for home in (module._parameters, module._buffers):
                saved.append((home, dict(home)))
                for name, tensor in home.items():
                    if tensor is not None:
                        if id(tensor) not in memo:
                            memo[id(tensor)] = replace(tensor)
                        home[name] = memo[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for home, before in saved:
            home.update(before)
        renew_lists(root)


def renew_lists(root: nn.Module) -> None:
    """Make LSTMs and the like, which keep a list of their own tensors, forget what stood in for them."""
    for module in root.modules():
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its data: every parameter and buffer is on the meta device."""
    return copy_with(module, lambda _, tensor: tensor.to("meta"))


def adopt_tensors(
    root: nn.Module, branches: Sequence[nn.Module], done: Callable[[str], bool] = lambda _: False
) -> None:
    """Register the stacked tensors of M modules under their dotted names, ties included; missing inner nodes are made.

    Args:
        root: Root of the new tree.
        branches: M modules whose tensors agree in names and shapes.
        done: Says of a module's path that it and its tensors are in the new tree already.
    """
    tensors = [tensors_of(branch) for branch in branches]
    leaders: dict[int, Tensor] = {}
    for path, module in branches[0].named_modules(remove_duplicate=False):
        owner = descend(root, path)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            dotted = f"{path}.{name}" if path else name
            home: dict[str, Any] = owner._parameters if name in module._parameters else owner._buffers
            if tensor is None:
                if not done(path):
                    home[name] = None
                continue
            if id(tensor) not in leaders:
                leaders[id(tensor)] = home[name] if done(path) else stack([own[dotted] for own in tensors])
            home[name] = leaders[id(tensor)]
            if name in module._non_persistent_buffers_set:
                owner._non_persistent_buffers_set.add(name)


def descend(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path; missing inner nodes are made."""
    for name in path.split(".") if path else []:
        if name not in root._modules:
            root.add_module(name, Container())
        child = root._modules[name]
        assert child is not None  # noqa: S101 (for the type checker: only modules are added)
        root = child
    return root


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors along a new axis 0; parameters give a parameter with the same ``requires_grad``."""
    stacked = torch.stack([tensor.detach() for tensor in tensors])
    first = tensors[0]
    return nn.Parameter(stacked, first.requires_grad) if isinstance(first, nn.Parameter) else stacked


class StackedModule(nn.Module):
    """M modules of one architecture as one: same dotted names, every parameter and buffer with axis 0 = M.

    Subclasses compute. ``from_branches`` makes one from M modules, ``to_branches`` gives them back.

    Attributes:
        num_branches: M.
    """

    num_branches: int
    takes_shared = False  # whether forward takes shared=True: one input for all branches
    _skeletons: tuple[nn.Module, ...]
    _layers: tuple[nn.Module, ...] = ()  # the one layer that computes, if it is not the module itself

    @classmethod
    def from_branches(cls, branches: Sequence[nn.Module]) -> "StackedModule":
        """Stack M modules; they are copied and stay usable.

        Args:
            branches: Modules whose parameters agree in names, shapes, dtypes and devices.

        Returns:
            The stacked module, in the mode (training or not) of the first branch.

        Raises:
            ValueError: If there is no module.
        """
        if not branches:
            raise ValueError(f"{cls.__name__}.from_branches: branches must hold at least one module, got none")
        stacked = cls()
        stacked.num_branches = len(branches)
        stacked._skeletons = tuple(skeleton(branch) for branch in branches)
        adopt_tensors(stacked, branches)
        stacked.train(branches[0].training)
        return stacked

    def train(self, mode: bool = True) -> "StackedModule":
        """Set the modes that ``train`` of a branch sets.

        Args:
            mode: As ``torch.nn.Module.train``.

        Returns:
            The module.
        """
        if not hasattr(self, "_skeletons"):
            return super().train(mode)
        train_as(self, self.settings, mode)
        for layer in self._layers:
            layer.train(self.training)
        return self

    def to_branches(self) -> list[nn.Module]:
        """Return M plain modules with the original names and the current values.

        Returns:
            Copies, on the device and in the mode of this module; changing them does not change it.

        Raises:
            ValueError: If a tensor is no longer there, because of a parametrization for instance.
        """
        now = tensors_of(self)
        missing = [name for name in tensors_of(self.settings) if name not in now]
        if missing:
            raise ValueError(
                f"unfuse: net must have the tensors it was made with, got no {', '.join(map(repr, missing))}; "
                "torch.nn.utils.parametrize.remove_parametrizations bakes a parametrization in"
            )
        branches = []
        for k, bones in enumerate(self._skeletons):
            branch = copy_with(bones, lambda name, _, k=k: now[name].detach()[k].clone())  # type: ignore[misc]
            requires_grad = {name: tensor.requires_grad for name, tensor in now.items()}
            for name, parameter in branch.named_parameters():
                parameter.requires_grad_(requires_grad[name])
            for name, module in branch.named_modules():
                module.training = mode_of(self, name)
            branches.append(branch)
        return branches

    @property
    def settings(self) -> nn.Module:
        """A module with the settings (stride, eps, ...) that all branches share; it has no data."""
        return self._skeletons[0]


def train_as(stacked: Module, bones: nn.Module, mode: bool) -> Module:
    """Set the modes that ``bones.train(mode)`` sets, which a class may override, path by path.

    Args:
        stacked: Module tree with the names of ``bones``; layers may have inner modules of their own.
        bones: Module of the original class; its modes change too.
        mode: As ``torch.nn.Module.train``.

    Returns:
        ``stacked``.
    """
    bones.train(mode)
    for path, module in stacked.named_modules(remove_duplicate=False):
        module.training = mode_of(bones, path)
        inherited = type(module).train in {nn.Module.train, Container.train, StackedModule.train}
        if module is not stacked and not inherited:
            module.train(module.training)  # a rule's layer may do more
    return stacked


def mode_of(root: nn.Module, path: str) -> bool:
    """Training flag of the deepest module on a path."""
    for name in path.split(".") if path else []:
        child = root._modules.get(name)
        if child is None:
            break
        root = child
    return root.training
