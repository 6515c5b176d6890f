"""What a fused network would silently drop is refused: hooks, shared memory, a ``train`` that does more."""

from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from bsfast.fuse.compare import captured
from bsfast.nn.attributes import attributes_of, changed_attributes, own_attributes, version_of
from bsfast.nn.stacked import CALL_HOOKS, tensors_of

_HOOKS = CALL_HOOKS | {
    "_state_dict_hooks": "state-dict hook",
    "_state_dict_pre_hooks": "state-dict pre-hook",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "load-state-dict hook",
}
_TENSOR_HOOKS = {
    "_backward_hooks": "gradient hook",
    "_post_accumulate_grad_hooks": "hook after gradient accumulation",
}


def check_supported(branch: nn.Module, k: int) -> None:
    """Refuse what fusion would silently drop.

    Args:
        branch: A module.
        k: Its index, for the message.

    Raises:
        ValueError: If a module or tensor has a hook, or a module has a parametrization, a forward, train or eval of
            its own, holds modules or parameters that are not registered, or is not initialised yet.
    """
    for name, tensor in tensors_of(branch).items():
        _refuse_hooks(tensor, _TENSOR_HOOKS, f"{name!r} of branch {k}")
    registered = {id(entry) for entry in [*branch.modules(), *tensors_of(branch).values()]}
    for path, module in branch.named_modules():
        where = f"{type(module).__name__} {path!r} of branch {k}" if path else f"branch {k}"
        if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"fuse: branches must be initialised, got the lazy {where}; run one batch through it first"
            )
        if is_parametrized(module):
            raise ValueError(
                f"fuse: branches must have no parametrizations, got one on {where}; "
                "torch.nn.utils.parametrize.remove_parametrizations bakes it in"
            )
        _refuse_hooks(module, _HOOKS, where)
        for method in vars(module).keys() & {"forward", "train", "eval"}:
            raise ValueError(
                f"fuse: {method} must be a method of the class, got one set on the instance {where}; subclass it"
            )
        if type(module).eval is not nn.Module.eval:
            raise ValueError(
                f"fuse: eval must be that of torch.nn.Module, got one of its own on {where}; override train, which "
                "eval calls"
            )
        for name, value in own_attributes(module).items():
            for held in _held_by(value):
                if id(held) not in registered and (isinstance(held, nn.Module) or held.requires_grad):
                    raise ValueError(
                        f"fuse: modules and tensors that require gradients must be registered, got a "
                        f"{type(held).__name__} in the attribute {name!r} of {where}; use ModuleList or Parameter"
                    )


def _refuse_hooks(owner: nn.Module | Tensor, kinds: dict[str, str], where: str) -> None:
    for attribute, word in kinds.items():
        if getattr(owner, attribute, None):
            raise ValueError(f"fuse: branches must have no hooks, got a {word} on {where}; remove it and fuse again")


def _held_by(value: Any, depth: int = 4) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors inside containers, closures, partial functions and bound methods."""
    if isinstance(value, (nn.Module, Tensor)):
        yield value
        return
    inner: list[Any] = []
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = list(value)
    elif isinstance(value, dict):
        inner = list(value.values())
    elif isinstance(value, FunctionType):
        inner = [*captured(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, MethodType):
        inner = [value.__self__]
    elif isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    for entry in inner if depth else ():
        yield from _held_by(entry, depth - 1)


def check_memory(branches: Sequence[nn.Module]) -> None:
    """Refuse tensors that share memory if one is a parameter or buffer: fused, writing into it would not be seen.

    Args:
        branches: M modules; their plain tensors count too.

    Raises:
        ValueError: If two do.
    """
    spans: list[tuple[tuple[Any, ...], int, bool, str]] = []  # start, end, registered, name
    for k, branch in enumerate(branches):
        named = {id(tensor): (f"{name!r} of branch {k}", tensor) for name, tensor in tensors_of(branch).items()}
        registered = set(named)
        for path, module in branch.named_modules():
            for name, value in own_attributes(module).items():
                for held in _held_by(value):
                    if isinstance(held, Tensor):
                        dotted = f"{path}.{name}" if path else name
                        named.setdefault(id(held), (f"{dotted!r} of branch {k}", held))
        for key, (name, tensor) in named.items():
            if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
                start = tensor.data_ptr()
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                end = start + (last + 1) * tensor.element_size()
                spans.append(((str(tensor.device), start), end, key in registered, name))
    reach: dict[bool, tuple[str, int, str]] = {}  # of all, and of registered ones: device, furthest end so far, name
    for (device, start), end, is_registered, name in sorted(spans):
        last_device, last_end, other = reach.get(not is_registered, ("", 0, ""))
        if device == last_device and start < last_end:
            raise ValueError(
                f"fuse: parameters and buffers must not share memory, got {other} and {name}; clone one of them, or "
                "register one object under both names"
            )
        for only_registered in (False, True) if is_registered else (False,):
            if reach.get(only_registered, ("", 0, ""))[:2] < (device, end):
                reach[only_registered] = (device, end, name)


def check_train(skeletons: Sequence[nn.Module]) -> None:
    """Check that ``train`` of the branches, where a class overrides it, sets modes only, and the same ones in all.

    Args:
        skeletons: The branches without data.

    Raises:
        ValueError: If it changes an attribute or a tensor, or sets other modes in another branch.
    """
    if all(type(module).train is nn.Module.train for bones in skeletons for module in bones.modules()):
        return
    for mode in (True, False):
        modes = [_modes_after_train(bones, mode) for bones in skeletons]
        for k, own in enumerate(modes):
            for path, training in own.items():
                if training != modes[0][path]:
                    raise ValueError(
                        f"fuse: train({mode}) must set the same modes in all branches, got "
                        f"training={modes[0][path]} at {path or 'the top'!r} in branch 0 and {training} in branch {k}"
                    )


def _modes_after_train(bones: nn.Module, mode: bool) -> dict[str, bool]:
    attributes, tensors = attributes_of(bones), _states_of(bones)
    modes = modes_of(bones, mode)
    changed = [
        f"the attribute {name!r} of {path!r}" for path, name in changed_attributes(attributes, attributes_of(bones))
    ]
    now = _states_of(bones)
    changed += [repr(name) for name in {**tensors, **now} if tensors.get(name) != now.get(name)]
    if changed:
        raise ValueError(f"fuse: train() must change modes only, got a change of {changed[0]}")
    return modes


def _states_of(bones: nn.Module) -> dict[str, tuple[int, int, bool]]:
    return {name: (id(t), version_of(t), t.requires_grad) for name, t in tensors_of(bones).items()}


def modes_of(bones: nn.Module, mode: bool) -> dict[str, bool]:
    """Modes by path after ``bones.train(mode)``; its own are put back."""
    before = {module: module.training for module in bones.modules()}
    bones.train(mode)
    modes = {path: module.training for path, module in bones.named_modules(remove_duplicate=False)}
    for module, training in before.items():
        module.training = training
    return modes
