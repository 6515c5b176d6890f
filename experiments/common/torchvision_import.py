"""Import torchvision where its compiled operators do not fit the installed PyTorch."""

from types import ModuleType

import torch

_KEPT: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision; if its compiled operators are missing, declare the two schemas its import asks for.

    torchvision registers shape functions for ``nms`` and ``qnms`` when it is imported, which fails if its own shared
    library did not load, as a torchvision wheel built for CUDA does beside a CPU-only PyTorch. Its data sets need no
    compiled operator, so empty schemas are enough. They are declared only after the import has failed for this reason.

    Returns:
        The module ``torchvision``, with ``torchvision.datasets`` loaded.

    Raises:
        RuntimeError: If torchvision cannot be imported for another reason, or is not installed.
    """
    try:
        import torchvision.datasets
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"import_torchvision: torchvision must be installed, got {error}; pip install --no-deps torchvision"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_missing_schemas()
        import torchvision.datasets
    return torchvision


def _declare_missing_schemas() -> None:
    # The schemas live as long as the Library object does.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
