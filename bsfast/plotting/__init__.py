"""Draw what :mod:`bsfast.analysis` measures: arrays -> ``matplotlib.figure.Figure``.

Nothing is computed here but colour limits, and neither torch nor pyplot is imported: pass NumPy arrays, save with
``figure.savefig``. Branches are numbered from 1, as in the paper (Brokman & Gilboa, Analysis of Branch Specialization
and its Application in Image Decomposition, arXiv 2206.05810). Blue is negative, yellow positive, white zero and grey
NaN: colours that colour-blind readers can tell apart.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("bsfast.plotting: matplotlib must be installed, got none; pip install bsfast[plot]") from error

from bsfast.plotting.branches import active_silent_figure, covariance_figure, responses_figure
from bsfast.plotting.classes import branch_outputs_figure, class_summary_figure, confidence_figure

__all__ = [
    "active_silent_figure",
    "branch_outputs_figure",
    "class_summary_figure",
    "confidence_figure",
    "covariance_figure",
    "responses_figure",
]
