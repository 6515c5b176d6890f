"""bsfast.analysis refuses wrong input, with the whole text of each message."""

import math

import pytest
import torch

from bsfast import analysis

MATRIX, OUTPUTS, LABELS = torch.ones(2, 3), torch.ones(2, 3, 4), torch.tensor([0, 1, 2])
ERRORS = {
    "threshold": (
        lambda: analysis.active_branches(MATRIX, 2.0),
        "active_branches: threshold must be in (0, 1], got 2.0",
    ),
    "threshold_0": (
        lambda: analysis.active_branches(MATRIX, 0.0),
        "active_branches: threshold must be in (0, 1], got 0.0",
    ),
    "threshold_nan": (
        lambda: analysis.active_branches(MATRIX, math.nan),
        "active_branches: threshold must be in (0, 1], got nan",
    ),
    "active_shape": (
        lambda: analysis.active_branches(torch.ones(3)),
        "active_branches: responses must have shape (M, ...), got (3,)",
    ),
    "active_centred": (
        lambda: analysis.active_branches(MATRIX, centred=True),
        "active_branches: responses must have shape (M, N, C) when centred, got (2, 3); "
        "pass the branch outputs, not the response matrix (scalar outputs: unsqueeze(-1))",
    ),
    "nan": (
        lambda: analysis.active_branches(torch.tensor([[math.nan, 1.0, math.inf]])),
        "active_branches: responses must be finite, got 2 NaN or infinite values",
    ),
    "response_shape": (
        lambda: analysis.response_matrix(torch.ones(3)),
        "response_matrix: outputs must have shape (M, N, ...), got (3,)",
    ),
    "empty": (
        lambda: analysis.response_matrix(torch.ones(3, 0)),
        "response_matrix: outputs must not be empty, got (3, 0)",
    ),
    "covariance_shape": (
        lambda: analysis.covariance(OUTPUTS),
        "covariance: responses must have shape (M, D), got (2, 3, 4)",
    ),
    "pearson_shape": (lambda: analysis.pearson(OUTPUTS), "pearson: responses must have shape (M, D), got (2, 3, 4)"),
    "cosine_shape": (lambda: analysis.cosine(MATRIX), "cosine: cov must have shape (M, M), got (2, 3)"),
    "cosine_negative": (
        lambda: analysis.cosine(-torch.eye(2)),
        "cosine: cov must have a non-negative diagonal, got -1",
    ),
    "ratio_shape": (lambda: analysis.offdiag_ratio(MATRIX), "offdiag_ratio: cov must have shape (M, M), got (2, 3)"),
    "offdiag_shape": (
        lambda: analysis.offdiag_cosine(MATRIX, torch.ones(2) > 0),
        "offdiag_cosine: cov must have shape (M, M), got (2, 3)",
    ),
    "offdiag_active": (
        lambda: analysis.offdiag_cosine(torch.eye(2), torch.ones(3) > 0),
        "offdiag_cosine: active must be boolean, of shape (2,), got torch.bool, (3,)",
    ),
    "offdiag_indices": (
        lambda: analysis.offdiag_cosine(torch.eye(2), torch.tensor([0, 1])),
        "offdiag_cosine: active must be boolean, of shape (2,), got torch.int64, (2,)",
    ),
    "energy_shape": (
        lambda: analysis.region_energy(MATRIX, LABELS),
        "region_energy: outputs must have shape (M, N, C, ...), got (2, 3)",
    ),
    "energy_regions": (
        lambda: analysis.region_energy(OUTPUTS, LABELS, num_regions=2),
        "region_energy: labels must be in [0, 2), got 2",
    ),
    "pixel_shape": (
        lambda: analysis.region_energy(torch.ones(2, 3, 1, 4, 4), torch.zeros(3, 4, 5, dtype=torch.int64)),
        "region_energy: labels must have shape (3, 4, 4) on cpu, got (3, 4, 5) on cpu",
    ),
    "shares_negative": (
        lambda: analysis.energy_shares(-MATRIX),
        "energy_shares: energy must be non-negative of shape (M, R), got (2, 3) with minimum -1",
    ),
    "selectivity": (
        lambda: analysis.selectivity(OUTPUTS),
        "selectivity: energy must be non-negative of shape (M, R), got (2, 3, 4) with minimum 1",
    ),
    "completeness": (
        lambda: analysis.completeness(-torch.ones(3)),
        "completeness: energy must be non-negative of shape (M, R), got (3,) with minimum -1",
    ),
    "energy_empty": (lambda: analysis.completeness(torch.ones(0)), "completeness: energy must not be empty, got (0,)"),
    "energy_nan": (
        lambda: analysis.selectivity(MATRIX * math.nan),
        "selectivity: energy must be finite, got 6 NaN or infinite values",
    ),
    "kind": (
        lambda: analysis.confidence(OUTPUTS, LABELS, kind="raw"),
        "confidence: kind must be 'logit', 'centred' or 'margin', got 'raw'",
    ),
    "confidence_shape": (
        lambda: analysis.confidence(MATRIX, LABELS),
        "confidence: outputs must have shape (M, N, C), got (2, 3)",
    ),
    "margin": (
        lambda: analysis.confidence(torch.ones(2, 3, 1), torch.zeros(3, dtype=torch.int64), kind="margin"),
        "confidence: outputs must have at least two classes for a margin, got (2, 3, 1)",
    ),
    "label_shape": (
        lambda: analysis.confidence(OUTPUTS, LABELS[:2]),
        "confidence: labels must have shape (3,) on cpu, got (2,) on cpu",
    ),
    "label_device": (
        lambda: analysis.confidence(OUTPUTS, torch.zeros(3, dtype=torch.int64, device="meta")),
        "confidence: labels must have shape (3,) on cpu, got (3,) on meta",
    ),
    "label_high": (
        lambda: analysis.confidence(OUTPUTS, LABELS + 2),
        "confidence: labels must be in [0, 4), got 4",
    ),
    "label_negative": (
        lambda: analysis.class_summary(OUTPUTS, LABELS - 1),
        "class_summary: labels must be in [0, 4), got -1",
    ),
    "summary_shape": (
        lambda: analysis.class_summary(MATRIX, LABELS),
        "class_summary: outputs must have shape (M, N, C), got (2, 3)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_value_say_rule_and_value(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.complex64])
def test_errors_of_kind_name_the_dtype(dtype):
    with pytest.raises(TypeError) as error:
        analysis.covariance(torch.ones(2, 3, dtype=dtype))
    assert str(error.value) == f"covariance: responses must be float32 or float64, got {dtype}; call .float() first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_labels_of_another_kind_are_refused(dtype):
    with pytest.raises(TypeError) as error:
        analysis.class_summary(OUTPUTS, LABELS.to(dtype))
    assert str(error.value) == f"class_summary: labels must be integers, got {dtype}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
@pytest.mark.parametrize("name", analysis.__all__)
def test_every_function_refuses_another_dtype_in_its_own_name(name, dtype):
    with pytest.raises(
        TypeError, match=rf"^{name}: \w+ must be float32 or float64, got {dtype}; call .float\(\) first$"
    ):
        getattr(analysis, name)(*arguments_of(name, dtype))


@pytest.mark.parametrize("name", analysis.__all__)
def test_every_function_refuses_what_is_no_tensor(name):
    arguments = arguments_of(name)
    for k, argument in enumerate(arguments):
        wrong = [*arguments[:k], argument.tolist(), *arguments[k + 1 :]]
        with pytest.raises(TypeError, match=rf"^{name}: \w+ must be a torch.Tensor, got list; use torch.as_tensor$"):
            getattr(analysis, name)(*wrong)


def arguments_of(name, dtype=torch.float32):
    """Tensors that the function takes, the first of a dtype."""
    labels = (LABELS,) if name in {"region_energy", "confidence", "class_summary"} else ()
    masks = (torch.ones(3) > 0,) if name == "offdiag_cosine" else ()
    return torch.ones((2, 3, 4) if labels else (3, 3), dtype=dtype), *labels, *masks
