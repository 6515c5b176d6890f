"""bsfast.plotting draws the values it is given, in order, on the scale it says, and without torch."""

import io
import subprocess
import sys

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.figure import Figure

from bsfast import plotting
from bsfast.plotting import style

SIZES = [1, 2, 10, 16, 32]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape)


def render(figure: Figure) -> np.ndarray:
    """Draw the figure; warnings of the layout are errors here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=50)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def images(figure: Figure) -> list[np.ndarray]:
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in panels(figure)]


def limits(figure: Figure) -> list[tuple[float, float]]:
    return [axes.images[0].get_clim() for axes in panels(figure)]


def panels(figure: Figure) -> list:
    return [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


def tick_names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_import_loads_neither_torch_nor_pyplot():
    done = run_python(
        "import sys, bsfast.plotting; print([name for name in ('torch', 'matplotlib.pyplot') if name in sys.modules])"
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_import_without_matplotlib_says_how_to_get_it():
    done = run_python("import sys; sys.modules['matplotlib'] = None; import bsfast.plotting")
    assert done.stderr.strip().endswith(
        "ImportError: bsfast.plotting: matplotlib must be installed, got none; pip install bsfast[plot]"
    )


@pytest.mark.parametrize("num_branches", SIZES)
def test_covariance_figure_shows_each_matrix_on_one_symmetric_scale(num_branches):
    matrices = values(3, num_branches, num_branches)
    figure = plotting.covariance_figure(matrices, titles=["a", "b", "c"], title="all")
    for image, matrix in zip(images(figure), matrices, strict=True):
        np.testing.assert_array_equal(image, matrix)
    peak = np.abs(matrices).max()
    assert limits(figure) == [(-peak, peak)] * 3
    assert [axes.get_title() for axes in panels(figure)] == ["a", "b", "c"]
    assert render(figure).size


def test_covariance_figure_with_own_scales_and_sizes():
    matrices = [np.eye(2), 5 * np.eye(7), np.zeros((3, 3))]
    figure = plotting.covariance_figure(matrices, shared_scale=False, columns=2)
    assert limits(figure) == [(-1, 1), (-5, 5), (-1, 1)]
    assert render(figure).size


def test_covariance_figure_takes_one_matrix_and_draws_nan_grey():
    matrix = np.array([[2.0, np.nan], [np.nan, -1.0]])
    figure = plotting.covariance_figure(matrix)
    np.testing.assert_array_equal(images(figure)[0], matrix)
    assert limits(figure) == [(-2, 2)]
    red, green, blue, _ = panels(figure)[0].images[0].to_rgba(np.ma.masked_invalid(matrix))[0, 1]
    assert red == green == blue == 0.8


@pytest.mark.parametrize(
    ("num_branches", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (16, [1, 4, 8, 12, 16]), (32, [1, 8, 16, 24, 32])],
)
def test_branches_are_numbered_from_one(num_branches, expected):
    axes = panels(plotting.covariance_figure(np.eye(num_branches)))[0]
    assert tick_names(axes.xaxis) == tick_names(axes.yaxis) == [str(number) for number in expected]
    assert list(axes.get_xticks()) == [number - 1 for number in expected]


@pytest.mark.parametrize("num_branches", SIZES)
def test_responses_figure_draws_every_curve_and_the_matrix(num_branches):
    matrix, x, curves = values(num_branches, 4), np.linspace(-1, 2, 9), values(num_branches, 9)
    active = np.arange(num_branches) % 3 == 0
    total, targets = curves.sum(0) + 1, ([-1, 0], [0.5, 1.0])
    figure = plotting.responses_figure(
        matrix, x=x, curves=curves, total=total, targets=targets, active=active, sample_names=list("abcd")
    )
    np.testing.assert_array_equal(images(figure)[0], matrix)
    assert tick_names(figure.axes[1].xaxis) == list("abcd")
    drawn = [line.get_xydata() for line in figure.axes[0].lines]
    for y in (*curves, total):
        assert sum(len(line) == 9 and np.array_equal(line, np.column_stack([x, y])) for line in drawn) == 1
    assert any(np.array_equal(line, np.column_stack(targets)) for line in drawn)
    grey = [line for line in figure.axes[0].lines if line.get_color() == style.SILENT_COLOUR and len(line.get_xdata())]
    assert len(grey) == (~active).sum()
    assert render(figure).size


def test_responses_figure_names_a_few_active_branches_and_counts_the_silent():
    active = np.array([False, True, False, True])
    figure = plotting.responses_figure(x=[0, 1], curves=values(4, 2), active=active)
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["$v_{2}$", "$v_{4}$", "2 silent"]
    assert not panels(figure)


def test_responses_figure_without_curves_is_one_heat_map():
    figure = plotting.responses_figure(values(3, 50))
    assert len(panels(figure)) == 1
    assert render(figure).size


def test_active_silent_figure_draws_both_counts():
    figure = plotting.active_silent_figure([2, 4, 8], [2, 3, 3.5], [0, 1, 4.5])
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["active"] == [[2, 2], [4, 3], [8, 3.5]]
    assert lines["silent"] == [[2, 0], [4, 1], [8, 4.5]]
    assert render(figure).size


def test_active_silent_figure_log2_keeps_zeros_as_open_markers_at_the_bottom():
    figure = plotting.active_silent_figure([2, 4, 8], [2, 3, 3], [0, 1, 5], log2=True, title="log")
    axes = figure.axes[0]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["silent"] == [[4, 1], [8, 5]]
    open_markers = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xydata().tolist() for line in open_markers] == [[], [[2, 0]]]
    assert open_markers[1].get_transform() == axes.get_xaxis_transform()
    assert render(figure).size
    assert tick_names(axes.xaxis) == ["2", "4", "8"]


@pytest.mark.parametrize("num_branches", SIZES)
def test_branch_outputs_figure_orders_samples_by_class(num_branches):
    outputs, labels = values(num_branches, 9, 3), np.array([2, 0, 1, 1, 0, 2, 2, 0, 0])
    figure = plotting.branch_outputs_figure(outputs, labels, ["ant", "bee", "cow"], title="outputs")
    order = [1, 4, 7, 8, 2, 3, 0, 5, 6]
    for image, branch in zip(images(figure), outputs, strict=True):
        np.testing.assert_array_equal(image, branch[order].T)
    assert len(set(limits(figure))) == 1
    low, high = limits(figure)[0]
    assert -low == high == pytest.approx(np.percentile(np.abs(outputs), 99.5))
    boundaries = [line.get_xdata()[0] for line in panels(figure)[0].lines]
    assert boundaries == [3.5, 5.5]
    assert tick_names(panels(figure)[-1].xaxis) == tick_names(panels(figure)[0].yaxis) == ["ant", "bee", "cow"]
    assert panels(figure)[-1].get_xticks().tolist() == [1.5, 4.5, 7]
    assert render(figure).size


@pytest.mark.parametrize("num_branches", SIZES)
def test_confidence_figure_orders_samples_by_class(num_branches):
    confidence, labels = values(num_branches, 6), np.array([1, 0, 1, 0, 1, 0])
    figure = plotting.confidence_figure(confidence, labels, colour_label="margin")
    np.testing.assert_array_equal(images(figure)[0], confidence[:, [1, 3, 5, 0, 2, 4]])
    assert tick_names(figure.axes[0].xaxis) == ["0", "1"]
    assert figure.axes[1].get_ylabel() == "margin"
    assert render(figure).size


@pytest.mark.parametrize("num_branches", SIZES)
def test_class_summary_figure_shows_each_branch_on_one_scale(num_branches):
    summary = values(num_branches, 3, 3)
    figure = plotting.class_summary_figure(summary, ["ant", "bee", "cow"])
    for image, branch in zip(images(figure), summary, strict=True):
        np.testing.assert_array_equal(image, branch)
    assert set(limits(figure)) == {(-np.abs(summary).max(), np.abs(summary).max())}
    assert tick_names(panels(figure)[0].yaxis) == tick_names(panels(figure)[-1].xaxis) == ["ant", "bee", "cow"]
    assert render(figure).size


def test_arguments_are_not_changed_and_lists_and_integers_are_taken():
    outputs, labels = values(2, 4, 2), np.array([1, 0, 1, 0])
    before = outputs.copy(), labels.copy()
    plotting.branch_outputs_figure(outputs, labels)
    np.testing.assert_array_equal(outputs, before[0])
    np.testing.assert_array_equal(labels, before[1])
    assert images(plotting.confidence_figure([[1, 2], [3, 4]], [1, 0]))[0].tolist() == [[2, 1], [4, 3]]


@pytest.mark.parametrize(
    ("arrays", "percentile", "expected"),
    [
        ([[-3.0, 1.0], [2.0]], 100, 3.0),
        ([[0.0] * 999 + [7.0]], 99, 7.0),  # the percentile is 0: the maximum
        ([[0.0, 0.0]], 100, 1.0),
        ([[np.nan]], 100, 1.0),
        ([[np.nan, -0.5]], 100, 0.5),
        ([np.arange(101.0)], 90, 90.0),
    ],
)
def test_colour_limit(arrays, percentile, expected):
    assert style.colour_limit(*map(np.asarray, arrays), percentile=percentile) == expected


def test_diverging_colours_are_white_at_zero_and_equally_light_on_both_sides():
    def lightness(position):
        rgb = np.array(matplotlib.colors.to_rgb(style.DIVERGING(position)))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L*, from 0 to 100

    assert lightness(0.5) == pytest.approx(100, abs=1)
    for step in np.linspace(0.05, 0.5, 10):
        assert lightness(0.5 - step) == pytest.approx(lightness(0.5 + step), abs=3)


ERRORS = {
    "cov_shape": (
        lambda: plotting.covariance_figure(values(2, 3)),
        "covariance_figure: matrices must have shape (M, M), got (2, 3)",
    ),
    "cov_axes": (
        lambda: plotting.covariance_figure([[1.0, 2.0]]),
        "covariance_figure: matrices must have shape (M, M) and not be empty, got (2,)",
    ),
    "cov_none": (
        lambda: plotting.covariance_figure([]),
        "covariance_figure: matrices and columns must be at least 1, got 0 and 5",
    ),
    "cov_titles": (
        lambda: plotting.covariance_figure([np.eye(2)], titles=["a", "b"]),
        "covariance_figure: titles must have 1 names, got 2",
    ),
    "cov_inf": (
        lambda: plotting.covariance_figure(np.full((2, 2), np.inf)),
        "covariance_figure: matrices must not be infinite, got 4 such values",
    ),
    "resp_neither": (
        plotting.responses_figure,
        "responses_figure: responses or curves must be given, got neither",
    ),
    "resp_x": (
        lambda: plotting.responses_figure(np.eye(2), x=[1.0]),
        "responses_figure: x and curves must be given together, got one of them",
    ),
    "resp_curves": (
        lambda: plotting.responses_figure(x=[1.0, 2.0], curves=np.eye(3)),
        "responses_figure: curves must have shape (M, X=2), got (3, 3)",
    ),
    "resp_active": (
        lambda: plotting.responses_figure(x=[1.0, 2.0], curves=np.eye(2), active=[0, 1]),
        "responses_figure: active must be boolean, of shape (2,), got int64, (2,)",
    ),
    "resp_total": (
        lambda: plotting.responses_figure(x=[1.0, 2.0], curves=np.eye(2), total=[1.0]),
        "responses_figure: total must have shape (2,), got (1,)",
    ),
    "resp_targets": (
        lambda: plotting.responses_figure(x=[1.0, 2.0], curves=np.eye(2), targets=([1.0], [1.0, 2.0])),
        "responses_figure: targets must have shape (1,), got (2,)",
    ),
    "resp_names": (
        lambda: plotting.responses_figure(np.eye(2), sample_names=["a"]),
        "responses_figure: sample_names must have 2 names, got 1",
    ),
    "counts": (
        lambda: plotting.active_silent_figure([2, 4], [1, 2], [1, -2]),
        "active_silent_figure: silent must be non-negative, of shape (2,), got shape (2,) with minimum -2",
    ),
    "counts_shape": (
        lambda: plotting.active_silent_figure([2, 4], [1], [1, 2]),
        "active_silent_figure: active must be non-negative, of shape (2,), got shape (1,) with minimum 1",
    ),
    "outputs": (
        lambda: plotting.branch_outputs_figure(np.eye(2), [0, 1]),
        "branch_outputs_figure: outputs must have shape (M, N, C) and not be empty, got (2, 2)",
    ),
    "outputs_labels": (
        lambda: plotting.branch_outputs_figure(values(2, 3, 4), [0, 1]),
        "branch_outputs_figure: labels must have shape (3,), got (2,)",
    ),
    "outputs_high": (
        lambda: plotting.branch_outputs_figure(values(2, 2, 4), [0, 4]),
        "branch_outputs_figure: labels must be in [0, 4), got 4",
    ),
    "outputs_names": (
        lambda: plotting.branch_outputs_figure(values(2, 2, 4), [0, 1], ["a", "b"]),
        "branch_outputs_figure: class_names must have 4 names, got 2",
    ),
    "confidence_labels": (
        lambda: plotting.confidence_figure(np.eye(2), [0]),
        "confidence_figure: labels must have shape (2,), got (1,)",
    ),
    "confidence_low": (
        lambda: plotting.confidence_figure(np.eye(2), [0, -1]),
        "confidence_figure: labels must be in [0, 1), got -1",
    ),
    "summary": (
        lambda: plotting.class_summary_figure(values(2, 3, 4)),
        "class_summary_figure: summary must have shape (M, C, C), got (2, 3, 4)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_value_say_rule_and_value(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole text is compared
        call()
    assert str(error.value) == message


def test_errors_of_kind_name_the_dtype():
    with pytest.raises(TypeError) as error:
        plotting.confidence_figure(np.eye(2) * 1j, [0, 1])
    assert str(error.value) == "confidence_figure: confidence must hold real numbers, got dtype complex128"
    with pytest.raises(TypeError) as error:
        plotting.confidence_figure(np.eye(2), [0.0, 1.0])
    assert str(error.value) == "confidence_figure: labels must be integers, got float64"
