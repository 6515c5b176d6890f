"""What stands between a tensor and a kernel; the one place that reads torch's private stack of function transforms."""

import torch


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active, through which only stock operators can go."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def forward_mode_levels() -> int:
    """Count the forward-mode levels (``jvp``, ``jacfwd``) that torch.func has active.

    ``torch.autograd.Function.jvp`` is silently wrong under two or more of them, so operators must know.

    Returns:
        Number of active levels.

    Raises:
        RuntimeError: If this torch hides the stack.
    """
    try:
        from torch._C._functorch import TransformType
        from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
    except ImportError as error:
        raise RuntimeError(
            "bsfast: this torch hides torch.func's stack of transforms, and nested forward mode would be silently "
            "wrong; use a torch version that CHANGELOG.md lists as tested"
        ) from error
    return sum(level.key() == TransformType.Jvp for level in retrieve_all_functorch_interpreters())


def is_batched(x: torch.Tensor) -> bool:
    """Whether a tensor stands for several: under ``torch.vmap``, or in a backward of ``is_grads_batched=True``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def has_memory(x: torch.Tensor) -> bool:
    """Whether a tensor has data that kernels can take: it is no subclass, such as those without data in reports."""
    return type(x) in {torch.Tensor, torch.nn.Parameter}
