"""Building a fused network: the tree of branched layers, then a checked program a mode and choice of constants."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from bsfast.fuse import compare
from bsfast.fuse.program import Program
from bsfast.fuse.rules import find_rule
from bsfast.fuse.trace import trace
from bsfast.nn.stacked import StackedModule, adopt_tensors, descend, stack, tensors_of
from bsfast.nn.vmapped import Vmapped, runs_as


def build_tree(net: StackedModule, branches: Sequence[nn.Module]) -> None:
    """Give a network the branches' module tree: fused layers where a rule says how, plain nodes elsewhere.

    Args:
        net: Empty network.
        branches: M modules that agree in names, shapes and modes.

    Raises:
        ValueError: If a name is taken, settings differ between branches, or a rule is wrong.
    """
    first = branches[0]
    names = {name for name, _ in first.named_children()} | {name for name in tensors_of(first) if "." not in name}
    for name in sorted(names):
        if name in vars(net) or hasattr(type(net), name):
            raise ValueError(
                f"fuse: modules and parameters must not be named like an attribute of Branched, got {name!r}; rename it"
            )
    ruled: set[str] = set()
    places: dict[nn.Module, str] = {}
    for path, module in first.named_modules(remove_duplicate=False):
        if not path or _inside(path, ruled):
            continue
        parent_path, _, name = path.rpartition(".")
        rule = find_rule(module)
        if module in places:  # one module under two names
            descend(net, parent_path).add_module(name, net.get_submodule(places[module]))
            ruled |= {path}
        elif rule is not None:
            modules = [branch.get_submodule(path) for branch in branches]
            compare.check_settings(modules, path)
            descend(net, parent_path).add_module(name, _checked(rule(modules), modules))
            ruled |= {path}
        else:
            descend(net, path)
        places.setdefault(module, path)
    adopt_tensors(net, branches, done=lambda path: _inside(path, ruled))
    for path, module in first.named_modules(remove_duplicate=False):
        if not any(path.startswith(f"{place}.") for place in ruled):
            net.get_submodule(path).training = module.training


def _inside(path: str, places: set[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:depth]) in places for depth in range(1, len(parts) + 1))


def _checked(fused: Any, modules: Sequence[nn.Module]) -> nn.Module:
    """Return what a rule made if it keeps the contract."""
    name = type(modules[0]).__name__
    if not isinstance(fused, nn.Module):
        raise TypeError(f"fuse: the rule of {name} must return a torch.nn.Module, got {type(fused).__name__}")
    if any(fused is module for module in modules):
        raise ValueError(f"fuse: the rule of {name} must return a new module, got one of the branches'")
    expected = {key: (len(modules), *tensor.shape) for key, tensor in tensors_of(modules[0]).items()}
    got = {key: tuple(tensor.shape) for key, tensor in tensors_of(fused).items()}
    if expected != got:
        raise ValueError(f"fuse: the rule of {name} must keep names and put M first, expected {expected}, got {got}")
    originals = {id(tensor) for module in modules for tensor in tensors_of(module).values()}
    shared = [key for key, tensor in tensors_of(fused).items() if id(tensor) in originals]
    if shared:
        raise ValueError(f"fuse: the rule of {name} must copy parameters and buffers, got the branches' own {shared}")
    return fused


def make_program(net: StackedModule, *, training: bool, constants: dict[str, Any]) -> Program:
    """Trace all branches and compare them.

    Args:
        net: Network with its tree; constants of forward code become buffers of it, untraceable modules run by vmap.
        training: Mode.
        constants: Arguments that hold no tensors, by name.

    Returns:
        What to run.
    """
    skeletons = net._skeletons
    traced = [trace(bones, training=training, constants=constants) for bones in skeletons]
    compare.check_graphs([graph for graph, _ in traced])
    graph, why_vmap = traced[0]
    for path in why_vmap:
        modules = [bones.get_submodule(path) for bones in skeletons]
        compare.check_settings(modules, path)
        if path and not isinstance(net.get_submodule(path), Vmapped):
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent)._modules[name] = Vmapped.around(net.get_submodule(path), modules)
    if graph is not None:
        _adopt_constants(net, graph)
    return Program(graph, why_vmap)


def _adopt_constants(net: StackedModule, graph: fx.Graph) -> None:
    """Stack plain tensors that forward code uses but no module registers."""
    registered = tensors_of(net.settings)
    unregister = set()
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in registered:
            continue
        path, _, leaf = node.target.rpartition(".")
        owners = [bones.get_submodule(path) for bones in net._skeletons]
        tensors = [getattr(owner, leaf) for owner in owners]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(f"fuse: forward must not compute constants from parameters in Python, got {node.target!r}")
        stacked = stack(tensors).to(next(iter(tensors_of(net).values()), torch.empty(0)).device)
        home = net.get_submodule(path)
        if leaf.startswith("_tensor_constant"):  # made by forward code, anew in each trace
            unregister |= {(owner, leaf) for owner in owners}
            leaf = _free_name(home, stacked)
            node.target = f"{path}.{leaf}" if path else leaf
        home.register_buffer(leaf, stacked, persistent=False)
    for owner, leaf in unregister:
        delattr(owner, leaf)


def _free_name(home: nn.Module, tensor: torch.Tensor) -> str:
    """Name of a buffer that holds the same constant already, or a new one."""
    number = 0
    while (known := home._buffers.get(f"_constant{number}")) is not None:
        if known.dtype == tensor.dtype and known.device == tensor.device and torch.equal(known, tensor):
            break
        number += 1
    return f"_constant{number}"


def warn_vmapped(net: StackedModule, programs: Sequence[Program]) -> None:
    """Warn once of each module that runs by vmap.

    Args:
        net: The network.
        programs: Its programs.
    """
    reasons = {path: reason for program in programs for path, reason in program.why_vmap.items()}
    for path, reason in reasons.items():
        module = net.settings.get_submodule(path)
        how = "torch.vmap of itself" if runs_as(module) == "vmap" else "a loop over branches"
        warnings.warn(
            f"bsfast: {type(module).__name__} {path or '(the whole branch)'!r} cannot be traced ({reason}); "
            f"it runs as {how}, which is right but slower. register_rule can teach bsfast to fuse it",
            stacklevel=5,
        )
