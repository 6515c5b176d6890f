"""``Branched``: M modules of one architecture as one ``nn.Module``."""

import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bsfast.fuse.arguments import Arguments, Key, key_of
from bsfast.fuse.assemble import build_tree, drop_constants, make_program, warn_vmapped
from bsfast.fuse.cuda_graph import CudaGraph, check_capture
from bsfast.fuse.curvature import CurvatureSweep
from bsfast.fuse.layer_jacobian import LayerJacobian
from bsfast.fuse.piecewise import Tail, tails
from bsfast.fuse.program import Program
from bsfast.fuse.report import Report, Spec, describe
from bsfast.fuse.supported import check_train
from bsfast.fuse.values import PerBranch, expand, leaves_of
from bsfast.nn.stacked import Container, StackedModule, skeleton

MOST_PROGRAMS: Final = 32  # traces that a network keeps, one a mode and choice of constant arguments


class Branched(StackedModule):
    """f(x) = v_1(x) + ... + v_M(x), all branches computed together; made by :func:`fuse`.

    An ordinary module: its parameters have the branches' names and a leading axis of length M. Elementwise optimizers
    (SGD, Adam) act as M separate ones; optimizers that use norms of whole tensors (LARS, clipping per tensor) do not.

    Source: Brokman & Gilboa (2022), arXiv 2206.05810, eq. 1.
    """

    _arguments: Arguments
    _programs: dict[tuple[bool, Key], Program | None]  # the one used longest ago first
    _dropped_programs: bool
    _depends_on_mode: bool
    _last_inputs: dict[str, Any] | None  # arguments of the last call, tensors without data

    @classmethod
    def from_branches(cls, branches: Sequence[nn.Module]) -> "Branched":
        """Fuse modules that :func:`fuse` has checked."""
        net = cls()
        net.num_branches = len(branches)
        net._skeletons = tuple(skeleton(branch) for branch in branches)
        check_train(net._skeletons)
        net._arguments = Arguments(net.settings.forward)
        net._programs, net._dropped_programs, net._depends_on_mode, net._last_inputs = {}, False, False, None
        build_tree(net, branches)
        constants = net._arguments.default_constants()
        warn_vmapped(net, [net._make_program(training, constants) for training in (True, False)])
        return net

    def forward(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return f(x), the sum over branches.

        Args:
            *inputs: What one branch takes; tensors shared by all branches, or stacked along a leading axis of length M.
            per_branch: Whether tensors are stacked, for all inputs or for each positional one.
            **named: As ``inputs``, by name; stacked only if ``per_branch`` is True.

        Returns:
            As one branch returns.
        """
        outputs = expand(self._run(inputs, per_branch, named), self.num_branches)
        return pytree.tree_map(lambda v: v.sum(0).contiguous(), outputs)

    def branch_outputs(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Any:
        """Return v_k(x) of all branches, in one pass.

        Args:
            *inputs: As :meth:`forward`.
            per_branch: As :meth:`forward`.
            **named: As :meth:`forward`.

        Returns:
            As one branch returns, each tensor with a leading axis of length M; contiguous, with memory of its own.
        """

        def one(leaf: PerBranch | Tensor) -> Tensor:
            if isinstance(leaf, PerBranch):
                return leaf.tensor.contiguous()
            shared = leaf.expand(self.num_branches, *leaf.shape)
            return torch.clone(shared, memory_format=torch.contiguous_format)

        return pytree.tree_map(one, self._run(inputs, per_branch, named))

    def cuda_graph(self, *inputs: Tensor, per_branch: bool | Sequence[bool] = False) -> CudaGraph:
        """Capture f(x) and its gradients into CUDA graphs, for sizes so small that starting kernels takes the time.

        The network is as before, buffers and random numbers too. The result computes what it would for inputs of the
        captured kind, in the captured mode and autocast state, with the parameters' present values; running statistics
        move and dropout draws anew at every call. Captured without gradients, under ``torch.no_grad()``, it has none.

        Each call's backward pass must come before the next call. There are no second derivatives. Python code of the
        branches does not run again. Memory stays allocated as long as the result lives.

        Args:
            *inputs: As :meth:`forward`, tensors only; on the GPU, as the network. They are not changed.
            per_branch: As :meth:`forward`.

        Returns:
            A function of ``inputs``.

        Raises:
            RuntimeError: If there is no GPU.
            TypeError: If an input is no tensor.
            ValueError: If something is on another device, or a hook watches the network.

        Example:
            graph = net.cuda_graph(x)
            for x, target in batches:  # all of one shape
                optimizer.zero_grad()
                loss(graph(x), target).backward()
                optimizer.step()
        """  # noqa: DOC502 (raised by check_capture)
        check_capture(self, inputs)
        return CudaGraph(self, inputs, per_branch)

    def report(self, *inputs: Any, per_branch: bool | Sequence[bool] = False, **named: Any) -> Report:
        """Say per node which kernel runs it and why, or why it fell back.

        Args:
            *inputs: As :meth:`forward`; by default those of the last call. Only shapes, dtypes and devices matter.
            per_branch: As :meth:`forward`.
            **named: As :meth:`forward`.

        Returns:
            A table; ``print`` it. Rows that depend on the input say so as long as none is known.
        """
        known = self._last_inputs
        if inputs or named:
            values, constants = self._arguments.bind(inputs, per_branch, named, self.num_branches)
            known = _described(values) | constants
        elif known is not None:
            constants = {name: v for name, v in known.items() if not any(isinstance(w, Spec) for w in leaves_of(v))}
        else:
            constants = self._arguments.default_constants()
        return describe(self, self._program(constants), known)

    def piecewise_linear_from(self, names: Sequence[str], *inputs: Any) -> dict[str, Tail]:
        """Prove from the traced graph what the network is as a function of single parameters.

        Args:
            names: Names of parameters.
            *inputs: What one branch takes, shared by all branches; only shapes, dtypes and devices matter.

        Returns:
            By name, whether the network is piecewise linear in the parameter and treats samples apart, and why.
        """
        values, constants = self._arguments.bind(inputs, False, {}, self.num_branches)
        return tails(self, self._program(constants), names, values)

    def weight_jacobian(self, layers: dict[str, str], *inputs: Any) -> LayerJacobian:
        """Run the network once, and keep what gradients of parameters for every sample need.

        Args:
            layers: For each wanted parameter the path of the one layer that reads it, as
                :meth:`piecewise_linear_from` says.
            *inputs: What one branch takes, shared by all branches.

        Returns:
            A function from cotangents to gradients.
        """
        values, constants = self._arguments.bind(inputs, False, {}, self.num_branches)
        program = self._program(constants)
        self._check_modes(program)
        return LayerJacobian(self, program, layers, values)

    def curvature_sweep(self, tensors: Sequence[Tensor], *inputs: Any) -> CurvatureSweep | None:
        """Run the network once, and keep what products with its Hessian have in common.

        Args:
            tensors: Parameters of this network.
            *inputs: What one branch takes, shared by all branches.

        Returns:
            What multiplies, or None where it cannot or nothing is won by it: outside evaluation mode, with random or
            complex numbers, or where no steps run as one kernel.
        """
        values, constants = self._arguments.bind(inputs, False, {}, self.num_branches)
        program = self._program(constants)
        self._check_modes(program)
        if any(module.training for module in self.modules()) or any(step.is_random for step in program.steps):
            return None
        if not program.steps or not any(step.op == "chain" and step.target.conv for step in program.schedule(self)):
            return None
        sweep = CurvatureSweep(self, program, tensors, values)
        return sweep if sweep.gains else None

    def _run(self, inputs: tuple[Any, ...], per_branch: bool | Sequence[bool], named: dict[str, Any]) -> Any:
        values, constants = self._arguments.bind(inputs, per_branch, named, self.num_branches)
        program = self._program(constants)
        self._check_modes(program)
        if not torch.compiler.is_compiling():
            self._last_inputs = _described(values) | constants
        outputs = program.run(self, self.settings, values, constants, self.num_branches)
        for leaf in leaves_of(outputs):
            if not isinstance(leaf, (Tensor, PerBranch)):
                raise TypeError(f"Branched: forward must return tensors, got {type(leaf).__name__}")
        return outputs

    def _program(self, constants: dict[str, Any]) -> Program:
        key = (self.training, key_of(constants))
        program = self._programs.get(key)
        if program is None:
            return self._make_program(self.training, constants)
        if not torch.compiler.is_compiling():
            self._programs[key] = self._programs.pop(key)
        return program

    def _make_program(self, training: bool, constants: dict[str, Any]) -> Program:
        key = key_of(constants)
        program = make_program(self, training=training, constants=constants)
        self._programs.pop((training, key), None)  # None, where the network was loaded from a file
        self._programs[training, key] = program
        if len(self._programs) > MOST_PROGRAMS:
            self._drop_program()
        other = self._programs.get((not training, key))
        self._depends_on_mode |= other is not None and not program.same_steps(other)
        return program

    def _drop_program(self) -> None:
        """Forget the program that was used longest ago."""
        if not self._dropped_programs:
            values: dict[str, set[Any]] = {}
            for _, key in self._programs:
                for name, *value in key:
                    values.setdefault(name, set()).add(tuple(value))
            name = max(values, key=lambda name: len(values[name]))
            warnings.warn(
                f"bsfast: forward is traced anew for every value of an argument that is no tensor, got more than "
                f"{MOST_PROGRAMS} traces, with {len(values[name])} values of {name!r}; pass it as a tensor",
                stacklevel=8,
            )
        self._dropped_programs = True
        dropped = self._programs.pop(next(iter(self._programs)))
        if dropped is not None:
            drop_constants(self, dropped, [program for program in self._programs.values() if program is not None])

    def _check_modes(self, program: Program) -> None:
        """Where training and evaluation run different graphs, containers must be in the mode they were traced in."""
        if not self._depends_on_mode:
            return
        for path, module in self.named_modules():
            if isinstance(module, Container) and module.training != program.modes.get(path, module.training):
                raise ValueError(
                    f"Branched: submodules whose forward depends on the mode must be in the mode of the network, got "
                    f"training={module.training} at {path!r} and {self.training} at the top"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last_inputs": None}


def _described(values: dict[str, Any]) -> dict[str, Any]:
    return {name: pytree.tree_map(Spec.of, value) for name, value in values.items()}
