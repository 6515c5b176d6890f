"""The Hessian of a classifier: numbers against functional autodiff, and tiny runs on the command line."""

import numpy as np
import pytest
import torch

from bsfast.hessian import Interaction
from experiments import cli
from experiments.classifier.loss import branched_loss
from experiments.classifier.model import make_branch
from experiments.common.augment import normalise
from experiments.common.record import Run
from experiments.hessian.measure import Curvature, curvature, loss_of, mean_of_cells
from experiments.hessian.run import judge
from tests.hessian import truth

QUICK = ["--widths", "1,1,1,1", "--branches", "2", "--epochs", "1", "--train-images", "32", "--batch-size", "32"]
QUICK += ["--speed-repeats", "0", "--test-images", "40", "--all-m", "3"]


def test_curvature_is_that_of_the_classifiers_loss():
    branches = [make_branch((2, 1, 1, 2), 4).eval() for _ in range(3)]
    images, labels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8), torch.randint(4, (6,))
    for clamp in ("hard", "none"):
        own = curvature(branches, images, labels, images, clamp=clamp)
        H = truth.hessian(branches, lambda f, y, clamp=clamp: branched_loss(f, y, clamp=clamp),
                          (normalise(images), labels), ["conv1.weight"])  # fmt: skip
        P = 54
        blocks = H.view(3, P, 3, P).transpose(1, 2)
        fro = blocks.square().sum((2, 3)).sqrt()
        torch.testing.assert_close(own.interaction.fro, fro.double(), rtol=1e-3, atol=1e-7)
        squares = fro.square()
        assert own.interaction.beta == pytest.approx((squares.diagonal().sum() / squares.sum()).item(), rel=1e-3)
        diagonal = [torch.linalg.eigvalsh(blocks[k, k].double()).flip(0)[:5] for k in range(3)]
        torch.testing.assert_close(own.eigenvalues[:, :5], torch.stack(diagonal), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(own.magnitude, H.abs(), rtol=1e-2, atol=1e-6)  # small: every cell is one element
        assert own.why.startswith("ggn: from 'conv1' on")
        assert own.density is None


@pytest.mark.parametrize("clamp", ["hard", "none"])
def test_loss_is_that_of_the_classifier(clamp):
    f, y = 2 * torch.randn(20, 5, dtype=torch.float64), torch.randint(5, (20,))
    torch.testing.assert_close(loss_of(clamp).value(f, y), branched_loss(f, y, clamp=clamp))


def test_mean_of_cells_stays_inside_blocks():
    matrix = torch.zeros(1200, 1200)
    matrix[:600, :600], matrix[600:, 600:], matrix[3, 1199] = -2, 4, 9
    cells = mean_of_cells(matrix, 2)
    assert cells.shape == (400, 400)
    assert cells[0, 0] == 2
    assert cells[200:, 200:].eq(4).all()
    assert cells[1, 399] == 1
    assert cells[:200, 200:].sum() == 1


def curvature_of(fro):
    fro = torch.tensor(fro)
    own = Interaction(fro, torch.zeros_like(fro), "blocks", True, "")
    return Curvature(fro, own, torch.tensor([True, True]), fro, None, {}, "")


@pytest.mark.parametrize(
    ("after", "learnt", "verdicts"),
    [
        ([[1.0, 0.1], [0.1, 1.0]], True, ["holds", "holds"]),
        ([[1.0, 1.0], [1.0, 1.0]], True, ["contradicted", "holds"]),
        ([[1.0, 2.0], [2.0, 1.0]], True, ["contradicted", "contradicted"]),
        ([[1.0, 0.1], [0.1, 1.0]], False, ["not tested", "not tested"]),
    ],
)
def test_judge(tmp_path, after, learnt, verdicts):
    record = Run("hessian", {}, tmp_path)
    judge(record, curvature_of([[1.0, 0.9], [0.9, 1.0]]), curvature_of(after), learnt=learnt)
    assert [claim["verdict"] for claim in record.claims] == verdicts
    assert [claim["observation"] for claim in record.claims] == [6, None]


def test_hessian_of_a_run_of_the_classifier(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BSFAST_DATA", raising=False)
    assert cli.main(["hessian", "--out", "out"]) == 1
    assert (
        "--out must hold a finished run of the classifier with its checkpoint.pt, got 'out'" in capsys.readouterr().err
    )
    assert cli.main(["classifier", *QUICK, "--out", "out"]) == 0
    (classifier,) = (tmp_path / "out").iterdir()
    assert cli.main(["hessian", "--out", "out", "--images", "20", "--whole-branch-images", "4"]) == 0
    (folder,) = (tmp_path / "out").glob("hessian-*")
    record = Run.load(folder)
    assert record.finished
    names = ["figure-5-right", "hessian-interaction", "hessian-spectra", "hessian-densities", "section-8"]
    assert [entry["name"] for entry in record.figures] == names
    assert all("M=2, widths 1, 1, 1, 1, loss averaged over 20" in entry["note"] for entry in record.figures)
    for time in ("initial", "trained"):
        measured = record.metrics[time]
        assert 0 < measured["beta"] <= 1
        assert np.shape(measured["kappa"]) == (2, 2)
        assert np.shape(measured["largest_eigenvalues"]) == (2, 5)
        assert len(measured["equilibrium"]["orthogonal"]) == 2
    assert record.metrics["initial"]["fro"] != record.metrics["trained"]["fro"]
    page = (folder / "report.html").read_text()
    assert "Figure 5, right" in page
    assert "Figure 6: what every branch says" in page
    drawn = {name: (folder / f"{name}.png").read_bytes() for name in names}
    record.redraw()
    assert drawn == {name: (folder / f"{name}.png").read_bytes() for name in names}
    assert cli.main(["figure", "5", "--run", str(folder)]) == 0

    again = ["hessian", "--run", str(classifier), "--out", "again", "--images", "20", "--whole-branch-images", "0"]
    assert cli.main([*again, "--clamp", "none"]) == 0
    (other,) = (tmp_path / "again").iterdir()
    assert [entry["name"] for entry in Run.load(other).figures] == [n for n in names if n != "hessian-densities"]
    assert Run.load(other).metrics["trained"]["fro"] != record.metrics["trained"]["fro"]
    assert cli.main(["hessian", "--run", str(folder)]) == 1
    assert "--run must name a run of the classifier with its checkpoint.pt, got" in capsys.readouterr().err
    (classifier / "checkpoint.pt").write_bytes(b"damaged")
    assert cli.main(["hessian", "--run", str(classifier), "--out", "third"]) == 1
    assert "must be a whole checkpoint, but it is damaged" in capsys.readouterr().err
