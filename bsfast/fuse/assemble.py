"""Building a fused network: the tree of branched layers, then a checked program a mode and choice of constants."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from bsfast.fuse import compare
from bsfast.fuse.program import Program
from bsfast.fuse.rules import find_rule, may_return_input
from bsfast.fuse.supported import modes_of
from bsfast.fuse.trace import trace
from bsfast.nn.stacked import Container, StackedModule, adopt_tensors, descend, stack, tensors_of
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
    if find_rule(first) is not None:
        _adopt_root(net, branches)
        return
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
            descend(net, parent_path).add_module(name, _ruled(branches, path))
            ruled |= {path}
        else:
            descend(net, path)
        places.setdefault(module, path)
    adopt_tensors(net, branches, done=lambda path: _inside(path, ruled))
    for path, module in first.named_modules(remove_duplicate=False):
        if not any(path.startswith(f"{place}.") for place in ruled):
            node = net.get_submodule(path)
            node.training = module.training
            if isinstance(node, Container):
                node._skeletons = (net.settings.get_submodule(path),)


def _adopt_root(net: StackedModule, branches: Sequence[nn.Module]) -> None:
    """Run a branch that is itself a module with a rule by that rule; the network's tensors are the layer's."""
    layer = _ruled(branches, "")
    for home in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(net, home, getattr(layer, home))  # one dictionary: what moves or replaces one's tensors, does both's
    net._layers = (layer,)
    adopt_tensors(net, branches, done=lambda _: True)
    net.training = layer.training = branches[0].training


def _ruled(branches: Sequence[nn.Module], path: str) -> nn.Module:
    """Apply the rule of the modules at a path."""
    modules = [branch.get_submodule(path) for branch in branches]
    rule = find_rule(modules[0])
    assert rule is not None  # noqa: S101 (for the type checker: the callers know)
    compare.check_settings(modules, path)
    return _checked(rule(modules), modules)


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
    modes = modes_of(net.settings, training)
    if net._layers:
        return Program(_graph_of_root(net.settings, constants), {}, modes)
    traced = [trace(bones, training=training, constants=constants, twice=bones is net.settings) for bones in skeletons]
    graph, why_vmap = traced[0]
    computed = graph is not None and _computed_from_parameters(graph, net.settings)
    if computed:
        graph, why_vmap = None, {"": f"{computed.meta.get('scope') or 'it'} computes with parameters in Python"}
    else:
        compare.check_graphs([graph for graph, _ in traced])
    for path in why_vmap:
        modules = [bones.get_submodule(path) for bones in skeletons]
        compare.check_settings(modules, path)
        if path and not isinstance(net.get_submodule(path), Vmapped):
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent)._modules[name] = Vmapped.around(net.get_submodule(path), modules)
    if graph is not None:
        _adopt_constants(net, graph)
    for module in (module for bones in skeletons for module in bones.modules()):
        for name in [name for name in vars(module) if name.startswith(_MADE_IN_TRACE)]:
            delattr(module, name)
    return Program(graph, why_vmap, modes)


def _graph_of_root(bones: nn.Module, constants: dict[str, Any]) -> fx.Graph:
    """Call the whole branch as one layer, on the arguments that are given."""
    graph = fx.Graph()
    positional: list[Any] = []
    named: dict[str, Any] = {}
    by_name = False
    for name, parameter in inspect.signature(bones.forward).parameters.items():
        left_out = name in constants and constants[name] is parameter.default
        by_name |= left_out or parameter.kind == parameter.KEYWORD_ONLY
        value = constants[name] if name in constants else graph.placeholder(name)
        if by_name and not left_out:
            named[name] = value
        elif not left_out:
            positional.append(value)
    layer = graph.create_node("call_module", "", tuple(positional), named, name="layer")
    layer.meta["may_alias"] = may_return_input(bones)
    graph.output(layer)
    return graph


def _computed_from_parameters(graph: fx.Graph, bones: nn.Module) -> fx.Node | None:
    """Find a constant that forward code made from parameters: it would be frozen, and its values are not even known."""
    for node in graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        made = node.op == "get_attr" and leaf.startswith(_MADE_IN_TRACE)
        if made and getattr(bones.get_submodule(path), leaf).is_meta:
            return node
    return None


def drop_constants(net: StackedModule, dropped: Program, kept: Sequence[Program]) -> None:
    """Forget the tensors that forward code made for a program and no other program uses.

    Args:
        net: The network.
        dropped: A program that it no longer has.
        kept: Those that it has.
    """
    needed = {step.target for program in kept for step in program.steps if step.op == "get_attr"}
    for step in dropped.steps:
        path, _, leaf = str(step.target).rpartition(".")
        if step.op == "get_attr" and leaf.startswith(_MADE_BY_FORWARD) and step.target not in needed:
            net.get_submodule(path)._buffers.pop(leaf, None)


_MADE_IN_TRACE = "_tensor_constant"  # torch.fx's names for what forward code makes, anew in each trace
_MADE_BY_FORWARD = "_constant"  # ours


def _adopt_constants(net: StackedModule, graph: fx.Graph) -> None:
    """Stack plain tensors that forward code uses but no module registers."""
    registered = tensors_of(net.settings)
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in registered:
            continue
        path, _, leaf = node.target.rpartition(".")
        owners = [bones.get_submodule(path) for bones in net._skeletons]
        tensors = [getattr(owner, leaf) for owner in owners]
        made = leaf.startswith(_MADE_IN_TRACE)
        _check_stackable(tensors, "a tensor that forward makes" if made else f"the tensor {node.target!r}")
        stacked = stack(tensors).to(next(iter(tensors_of(net).values()), torch.empty(0)).device)
        home = net.get_submodule(path)
        if made:
            leaf = _free_name(home, stacked)
            node.target = f"{path}.{leaf}" if path else leaf
        home.register_buffer(leaf, stacked, persistent=False)


def _check_stackable(tensors: Sequence[torch.Tensor], name: str) -> None:
    for k, tensor in enumerate(tensors):
        for what in ("shape", "dtype", "device"):
            a, b = (getattr(t, what) for t in (tensors[0], tensor))
            if a != b:
                a, b = (tuple(v) if isinstance(v, torch.Size) else v for v in (a, b))
                raise ValueError(f"fuse: {name} must have one {what}, got {a} in branch 0 and {b} in branch {k}")


def _free_name(home: nn.Module, tensor: torch.Tensor) -> str:
    """Name of a buffer that holds the same constant already, or a new one."""
    number = 0
    while (known := home._buffers.get(f"{_MADE_BY_FORWARD}{number}")) is not None:
        if known.dtype == tensor.dtype and known.device == tensor.device and torch.equal(known, tensor):
            break
        number += 1
    return f"{_MADE_BY_FORWARD}{number}"


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
