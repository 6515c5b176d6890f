"""``Branched``: M modules of one architecture as one ``nn.Module``, and ``fuse`` and ``unfuse`` that make and undo it."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bsfast.fuse import compare
from bsfast.fuse.program import Program
from bsfast.fuse.report import Report, Spec, describe
from bsfast.fuse.rules import find_rule
from bsfast.fuse.trace import trace
from bsfast.fuse.values import PerBranch, expand, leaves_of
from bsfast.nn.stacked import Container, StackedModule, adopt_tensors, descend, skeleton, stack, tensors_of
from bsfast.nn.vmapped import Vmapped

_REQUIRED = inspect.Parameter.empty


class Branched(StackedModule):
    """f(x) = v_1(x) + ... + v_M(x), all branches computed together; made by :func:`fuse`.

    An ordinary module: its parameters have the branches' names and a leading axis of length M. Elementwise optimizers (SGD,
    Adam) act as M separate ones; optimizers that use norms of whole tensors (LARS, clipping per tensor) do not.

    Source: Brokman & Gilboa (2022), arXiv 2206.05810, eq. 1.
    """

    def _assemble(self, branches: Sequence[nn.Module]) -> None:
        self.num_branches = len(branches)
        self._skeletons = tuple(skeleton(branch) for branch in branches)
        self._programs: dict[tuple[bool, tuple[tuple[str, Any], ...]], Program | None] = {}
        self._depends_on_mode = False
        self._last_inputs: dict[str, Any] | None = None
        signature = inspect.signature(self.settings.forward)
        self._arguments = {name: parameter.default for name, parameter in signature.parameters.items()}
        self._rules: set[str] = set()  # paths of the modules that a rule has fused
        for path, module in branches[0].named_modules(remove_duplicate=False):
            self._fuse_module(path, module, branches)
        adopt_tensors(self, branches, done=self._is_fused)
        for path, module in branches[0].named_modules(remove_duplicate=False):
            self.get_submodule(path).training = module.training
        defaults = {name: value for name, value in self._arguments.items() if value is not _REQUIRED}
        why_vmap = self._make_program(True, defaults).why_vmap | self._make_program(False, defaults).why_vmap
        for path, reason in why_vmap.items():
            _warn_vmapped(path, self.settings.get_submodule(path), reason)

    def _is_fused(self, path: str) -> bool:
        return path in self._rules or any(parent in self._rules for parent in _parents(path))

    def _fuse_module(self, path: str, module: nn.Module, branches: Sequence[nn.Module]) -> None:
        """Put the fused form of one place into the tree; inside an already fused module, nothing."""
        if not path or self._is_fused(path):
            return
        parent_path, _, name = path.rpartition(".")
        parent = descend(self, parent_path)
        if parent is self and hasattr(type(self), name):
            raise ValueError(f"fuse: submodules must not be named like an attribute of Branched, got {name!r}; rename it")
        first = next(p for p, m in branches[0].named_modules(remove_duplicate=False) if m is module)
        if first != path:  # one module under two names
            parent.add_module(name, self.get_submodule(first))
            self._rules |= {path} if first in self._rules else set()
            return
        rule = find_rule(module)
        if rule is None:
            descend(self, path)
            return
        modules = [branch.get_submodule(path) for branch in branches]
        compare.check_settings(modules, path)
        fused = rule(modules)
        expected = {key: (len(branches), *tensor.shape) for key, tensor in tensors_of(module).items()}
        got = {key: tuple(tensor.shape) for key, tensor in tensors_of(fused).items()}
        if expected != got:
            raise ValueError(
                f"fuse: the rule of {type(module).__name__} must keep names and put M first, expected {expected}, got {got}"
            )
        parent.add_module(name, fused)
        self._rules.add(path)

    def _make_program(self, training: bool, constants: dict[str, Any]) -> Program:
        """Trace all branches, compare them, and keep the program."""
        traced = [trace(bones, training=training, constants=constants) for bones in self._skeletons]
        compare.check_graphs([graph for graph, _ in traced])
        graph, why_vmap = traced[0]
        for path in why_vmap:
            modules = [bones.get_submodule(path) for bones in self._skeletons]
            compare.check_settings(modules, path)
            if path and not isinstance(self.get_submodule(path), Vmapped):
                parent, _, name = path.rpartition(".")
                self.get_submodule(parent)._modules[name] = Vmapped.around(self.get_submodule(path), modules)
        if graph is not None:
            self._adopt_constants(graph)
        program = Program(graph, why_vmap)
        self._programs[training, _key(constants)] = program
        other = self._programs.get((not training, _key(constants)))
        self._depends_on_mode |= other is not None and not program.same_steps(other)
        return program

    def _adopt_constants(self, graph: fx.Graph) -> None:
        """Stack plain tensors that forward code uses but no module registers."""
        registered = tensors_of(self.settings)
        for node in graph.nodes:
            if node.op != "get_attr" or node.target in registered:
                continue
            path, _, leaf = node.target.rpartition(".")
            owners = [bones.get_submodule(path) for bones in self._skeletons]
            tensors = [getattr(owner, leaf) for owner in owners]
            if any(tensor.is_meta for tensor in tensors):
                raise ValueError(f"fuse: forward must not compute constants from parameters in Python, got {node.target!r}")
            if leaf.startswith("_tensor_constant"):
                for owner in owners:
                    delattr(owner, leaf)
            device = next(iter(tensors_of(self).values()), torch.empty(0)).device
            self.get_submodule(path).register_buffer(leaf, stack(tensors).to(device), persistent=False)

    def forward(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return f(x), the sum over branches.

        Args:
            *inputs: What one branch takes; tensors shared by all branches, or stacked along a leading axis of length M.
            per_branch: Whether tensors are stacked, for all inputs or for each positional one.
            **named: As ``inputs``, by name; stacked only if ``per_branch`` is True.

        Returns:
            As one branch returns.
        """
        outputs = self._run(inputs, per_branch, named)
        return pytree.tree_map(
            lambda v: v.tensor.sum(0) if isinstance(v, PerBranch) else v * self.num_branches, outputs
        )

    def branch_outputs(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return v_k(x) of all branches, in one pass.

        Args:
            *inputs: As :meth:`forward`.
            per_branch: As :meth:`forward`.
            **named: As :meth:`forward`.

        Returns:
            As one branch returns, each tensor with a leading axis of length M.
        """
        return expand(self._run(inputs, per_branch, named), self.num_branches)

    def _run(self, inputs: tuple[Any, ...], per_branch: bool | Sequence[bool], named: dict[str, Any]) -> Any:
        values, constants = self._bind(inputs, per_branch, named)
        key = (self.training, _key(constants))
        program = self._programs.get(key) or self._make_program(self.training, constants)
        self._check_modes()
        if not torch.compiler.is_compiling():
            self._last_inputs = {name: pytree.tree_map(Spec.of, value) for name, value in values.items()} | constants
        outputs = program.run(self, self.settings, values, self.num_branches)
        for leaf in leaves_of(outputs):
            if not isinstance(leaf, (Tensor, PerBranch)):
                raise TypeError(f"Branched: forward must return tensors, got {type(leaf).__name__}")
        return outputs

    def _bind(
        self, inputs: tuple[Any, ...], per_branch: bool | Sequence[bool], named: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Match arguments to names; split them into values that hold tensors and constants."""
        names = list(self._arguments)
        if len(inputs) > len(names):
            raise TypeError(f"Branched: forward must get at most {len(names)} inputs {names}, got {len(inputs)}")
        given = dict(zip(names, inputs, strict=False))
        flags = [per_branch] * len(inputs) if isinstance(per_branch, bool) else list(per_branch)
        if len(flags) != len(inputs):
            raise ValueError(f"Branched: per_branch must be a bool or one a positional input ({len(inputs)}), got {flags}")
        stacked = dict(zip(names, flags, strict=False)) | dict.fromkeys(named, per_branch is True)
        for name, value in named.items():
            if name in given or name not in self._arguments:
                raise TypeError(f"Branched: forward must get each of {names} at most once, got {name!r}")
            given[name] = value
        values, constants = {}, {}
        for name, default in self._arguments.items():
            value = given.get(name, default)
            if value is _REQUIRED:
                raise TypeError(f"Branched: forward must get the input {name!r}, got {sorted(given)}")
            if any(isinstance(leaf, Tensor) for leaf in leaves_of(value)):
                values[name] = self._mark(name, value, stacked.get(name, False))
            else:
                constants[name] = value
        return values, constants

    def _mark(self, name: str, value: Any, stacked: bool) -> Any:
        def mark(leaf: Any) -> Any:
            if not (stacked and isinstance(leaf, Tensor)):
                return leaf
            if leaf.dim() == 0 or leaf.shape[0] != self.num_branches:
                raise ValueError(
                    f"Branched: {name} must have shape (M={self.num_branches}, N, ...) with per_branch, "
                    f"got {tuple(leaf.shape)}"
                )
            return PerBranch(leaf)

        return pytree.tree_map(mark, value)

    def _check_modes(self) -> None:
        """Where training and evaluation run different graphs, no container may be in the other mode."""
        if not self._depends_on_mode:
            return
        for path, module in self.named_modules():
            if isinstance(module, Container) and module.training != self.training:
                raise ValueError(
                    f"Branched: submodules whose forward depends on the mode must be in the mode of the network, got "
                    f"training={module.training} at {path!r} and {self.training} at the top"
                )

    def report(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Report:
        """Say per node which kernel runs it and why, or why it fell back.

        Args:
            *inputs: As :meth:`forward`; by default those of the last call. Only shapes, dtypes and devices matter.
            per_branch: As :meth:`forward`.
            **named: As :meth:`forward`.

        Returns:
            A table; ``print`` it. Rows that depend on the input say so as long as none is known.
        """
        if inputs or named:
            values, constants = self._bind(inputs, per_branch, named)
            known: dict[str, Any] | None = {n: pytree.tree_map(Spec.of, v) for n, v in values.items()} | constants
        else:
            known = self._last_inputs
            constants = {n: v for n, v in (known or self._arguments).items() if not _holds_tensors(v) and v is not _REQUIRED}
        program = self._programs.get((self.training, _key(constants))) or self._make_program(self.training, constants)
        return describe(self, program, known)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_inputs": None}


def fuse(branches: Sequence[nn.Module] | Callable[[], nn.Module], num_branches: int | None = None) -> Branched:
    """Fuse M modules of one architecture into one that computes them together.

    ``fuse(branches)(x)`` equals ``sum(branch(x) for branch in branches)``, and ``fuse(branches).branch_outputs(x)`` equals
    ``torch.stack([branch(x) for branch in branches])``.

    Args:
        branches: M modules; they are copied and stay usable. Or a callable that makes one, called ``num_branches`` times.
        num_branches: M, with a callable only.

    Returns:
        The fused module, in the branches' mode, on their device.

    Raises:
        TypeError: If ``branches`` is neither modules nor a callable.
        ValueError: If the branches differ in anything but the values of their tensors (the message names the first
            difference), or cannot be fused faithfully: hooks, parametrizations, control flow on data.

    Example:
        >>> net = fuse([nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(4)])
        >>> net(torch.ones(5, 3)).shape, net.branch_outputs(torch.ones(5, 3)).shape
        (torch.Size([5, 2]), torch.Size([4, 5, 2]))
    """
    modules = _make_branches(branches, num_branches)
    for k, branch in enumerate(modules):
        compare.check_supported(branch, k)
    compare.check_alike(modules)
    net = Branched()
    net._assemble(modules)
    return net


def unfuse(net: Branched) -> list[nn.Module]:
    """Return M plain modules with the original ``state_dict`` keys and the fused network's values, bit for bit.

    Args:
        net: Made by :func:`fuse`.

    Returns:
        Copies; changing them does not change ``net``.

    Raises:
        TypeError: If ``net`` is not a fused network.
    """
    if not isinstance(net, Branched):
        raise TypeError(f"unfuse: net must be a bsfast.Branched, got {type(net).__name__}")
    return net.to_branches()


def _make_branches(branches: Any, num_branches: int | None) -> list[nn.Module]:
    if callable(branches) and not isinstance(branches, nn.Module):
        if not isinstance(num_branches, int) or isinstance(num_branches, bool) or num_branches < 1:
            raise ValueError(f"fuse: num_branches must be a positive int with a callable, got {num_branches!r}")
        branches = [branches() for _ in range(num_branches)]
    elif num_branches is not None:
        raise ValueError(f"fuse: num_branches must be left out with a list of modules, got {num_branches!r}")
    if isinstance(branches, nn.Module) and not isinstance(branches, nn.ModuleList):
        raise TypeError(f"fuse: branches must be a list of modules or a callable, got one {type(branches).__name__}")
    modules = list(branches) if isinstance(branches, (Sequence, nn.ModuleList)) else [branches]
    if not modules:
        raise ValueError("fuse: branches must hold at least one module, got an empty list")
    for k, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"fuse: branches must be torch.nn.Modules, got {type(module).__name__} at index {k}")
    return modules


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _key(constants: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name, value in constants.items():
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(f"Branched: {name} must be a tensor or hashable, got {type(value).__name__}") from error
    return tuple(sorted(constants.items()))


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Spec) for leaf in leaves_of(value))


def _warn_vmapped(path: str, module: nn.Module, reason: str) -> None:
    warnings.warn(
        f"bsfast: {type(module).__name__} {path or '(the whole branch)'!r} cannot be traced ({reason}); it runs as torch.vmap "
        "of itself, which is right but slower. register_rule can teach bsfast to fuse it",
        stacklevel=4,
    )
