"""The classifier's measures and verdicts on cases made by hand."""

import math

import pytest
import torch
from torch.nn.functional import one_hot

from experiments.classifier import claims, measure
from experiments.classifier.claims import CRITERIA, Case, Criterion, Finding, Trained, find
from experiments.classifier.loss import branched_loss
from experiments.classifier.model import make_branch
from experiments.common.augment import normalise
from experiments.common.record import Run

LABELS = torch.arange(60) % 10
RIGHT = one_hot(LABELS, 10).float()


def network(scales, base=RIGHT):
    """Branches that say ``base`` each with its own strength."""
    return torch.tensor(scales)[:, None, None] * base


def case(**sizes):
    """Models by their M, initially all branches alike."""
    models = {int(name[1:]): outputs for name, outputs in sizes.items()}
    alike = {size: network([1.0] * size) for size in models}
    return Case({size: Trained(alike[size], own) for size, own in models.items()}, max(models), LABELS, gallery=(1, 2))


def with_silent(active, silent):
    return network([1.0] * active + [0.01] * silent)


def holds(measure_of, own):
    (criterion,) = [criterion for criterion in CRITERIA if criterion.measure is measure_of]
    return find(criterion, own).holds


def test_counts_are_judged_where_their_models_are():
    grown = case(m8=with_silent(6, 2), m16=with_silent(8, 8), m32=with_silent(10, 22))
    assert holds(claims.silent_grow, grown)
    assert holds(claims.active_constant, grown)
    grown = case(m8=with_silent(6, 2), m16=with_silent(8, 8), m32=with_silent(24, 8))
    assert not holds(claims.silent_grow, grown)
    assert not holds(claims.active_constant, grown)
    alone = case(m16=with_silent(8, 8))
    assert holds(claims.silent_grow, alone) is None
    (criterion,) = [criterion for criterion in CRITERIA if criterion.measure is claims.silent_grow]
    assert find(criterion, alone).text == "needs models of M=8, 32"


def test_some_silent_looks_at_every_model_it_names():
    assert holds(claims.some_silent, case(m16=with_silent(16, 0), m32=with_silent(31, 1)))
    assert not holds(claims.some_silent, case(m16=with_silent(16, 0)))
    assert holds(claims.some_silent, case(m4=with_silent(2, 2))) is None


def test_strengths_differ_takes_the_mean_of_the_middle_two():
    assert not holds(claims.strengths_differ, case(m4=network([1.0, 1.0, 1.9, 2.1])))
    assert holds(claims.strengths_differ, case(m4=network([1.0, 1.0, 1.0, 2.1])))


def test_less_correlated_by_hand():
    apart = torch.stack([RIGHT * (LABELS < 5)[:, None], RIGHT * (LABELS >= 5)[:, None]])
    assert holds(claims.less_correlated, case(m2=apart))
    assert not holds(claims.less_correlated, case(m2=network([1.0, 1.0])))
    assert holds(claims.less_correlated, case(m1=network([1.0]))) is None


def test_specialized_and_collaborating_branches():
    apart = torch.stack([RIGHT * (LABELS < 5)[:, None], RIGHT * (LABELS >= 5)[:, None]])
    assert holds(claims.specialized, case(m2=apart))
    assert holds(claims.collaborates, case(m2=apart))
    assert not holds(claims.specialized, case(m2=network([1.0, 1.0])))
    assert not holds(claims.collaborates, case(m2=network([1.0, 1.0])))


def test_more_is_better_compares_accuracies():
    half = network([1.0, 0.0], RIGHT * (LABELS < 5)[:, None])
    assert holds(claims.more_is_better, case(m2=half, m16=network([1.0] * 16)))
    assert not holds(claims.more_is_better, case(m2=network([1.0] * 2), m16=network([1.0] * 16)))


def test_more_is_better_is_contradicted_where_only_few_branches_learn():
    chance = network([1.0] * 16, one_hot((LABELS + 1) % 10, 10).float())
    assert holds(claims.more_is_better, case(m2=network([1.0] * 2), m16=chance)) is False
    assert holds(claims.more_is_better, case(m2=chance[:2], m16=chance)) is None


def test_inter_class_needs_a_branch_that_tells_classes_apart():
    noise = 0.1 * torch.randn(60, 10)
    assert measure.inter_class_pairs(network([1.0], noise), LABELS) == 0
    assert measure.inter_class_pairs(network([1.0], noise + RIGHT * (LABELS == 3)[:, None]), LABELS) == 10


def test_intra_class_needs_disagreement():
    noise = torch.randn(2, 60, 10)
    assert measure.intra_class_classes(torch.stack([noise[0], noise[0]]), LABELS) == []
    assert measure.intra_class_classes(torch.stack([noise[0], -noise[0]]), LABELS) == list(range(10))


def test_most_informative_ignores_constants():
    outputs = torch.stack([torch.full((60, 10), 9.0), 0.1 * RIGHT, 0.2 * RIGHT])
    assert measure.most_informative(outputs, LABELS, [1, 2, 3]) == [2, 1]


def test_rank_by_hand():
    outputs = torch.zeros(2, 60, 10)
    own = (LABELS == 4).nonzero()[:, 0]
    outputs[0, own, 4] = torch.arange(6.0)
    outputs[1, own, 4] = -torch.arange(6.0)
    ranking = measure.rank(outputs, LABELS, 4, (0, 1), 4)
    assert ranking.tops == (own[[5, 4, 3, 2]].tolist(), own[[0, 1, 2, 3]].tolist())
    assert (ranking.overlap, ranking.spearman) == (2, -1.0)


def test_tops_differ_by_hand():
    noise = torch.randn(240, 10)
    labels = torch.arange(240) % 10
    base = one_hot(labels, 10) + 0.1 * noise
    apart, alike = (torch.stack([base, one_hot(labels, 10) + sign * 0.1 * noise]) for sign in (-1, 1))
    for outputs, expected in ((apart, True), (alike, False)):
        own = Case({2: Trained(outputs, outputs)}, 2, labels, gallery=(1, 2))
        assert holds(claims.tops_differ, own) is expected


def test_sum_classifies_only_the_classes_there_are():
    outputs = network([1.0])
    few = Case({1: Trained(outputs[:, :3], outputs[:, :3])}, 1, LABELS[:3] + 1)
    assert find(Criterion("", None, "", claims.sum_classifies), few).text == "0 of 3 classes"


@pytest.mark.parametrize(
    ("classes", "right", "learnt"), [(10, 0.27, False), (10, 0.3, True), (2, 0.58, False), (2, 0.7, True)]
)
def test_not_learnt_is_a_fifth_of_the_way_from_chance(classes, right, learnt):
    labels = torch.arange(100 * classes) % classes
    wrong = (labels + 1) % classes
    said = torch.where(torch.arange(len(labels)) < right * len(labels), labels, wrong)
    reason = claims.not_learnt(one_hot(said, classes).float()[None], labels)
    assert (reason is None) == learnt
    if not learnt:
        assert reason.startswith(f"M=1 has not learnt: test accuracy {right:.1%}, chance {1 / classes:.1%}")


def test_an_untrained_network_is_judged_by_its_sum_only(tmp_path):
    dead = Case({16: Trained(torch.zeros(16, 60, 10), torch.zeros(16, 60, 10))}, 16, LABELS)
    record = Run("classifier", {}, root=tmp_path)
    claims.judge(record, [dead])
    told = {claim["claim"]: claim["verdict"] for claim in record.claims}
    (sums,) = [text for text in told if text.startswith("The sum classifies")]
    assert told.pop(sums) == "contradicted"
    assert set(told.values()) == {"not tested"}


def test_describe_gives_mean_and_spread_of_seeds():
    assert claims.describe([Finding(1.0, "one", True)]) == "one"
    text = claims.describe([Finding(1.0, "one", True), Finding(2.0, "two", False), Finding(math.nan, "none", None)])
    assert text == "1.5 ± 0.71 (mean, standard deviation over 2 seeds; met with 1 of 2; 1 cannot tell); first seed: one"


def test_sample_of_each_class_is_balanced_and_ordered():
    chosen = measure.sample_of_each_class(LABELS, 2, seed=0)
    assert LABELS[chosen].tolist() == [label for label in range(10) for _ in range(2)]
    assert len(set(chosen.tolist())) == 20


@pytest.mark.parametrize("clamp", ["hard", "none"])
def test_equilibrium_against_one_gradient_at_a_time(clamp):
    torch.manual_seed(1)
    branches = [make_branch((1, 1, 2, 2), 3).eval() for _ in range(2)]
    with torch.no_grad():
        branches[1].linear.weight.zero_()
    images, labels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])
    result = measure.equilibrium(branches, images, labels, clamp=clamp, batch_size=3)
    norms, products = [], []
    for branch in branches:
        for n in range(4):
            x = normalise(images[n : n + 1])
            f = torch.stack([other(x) for other in branches]).sum(0).detach().requires_grad_()
            (g,) = torch.autograd.grad(branched_loss(f, labels[n : n + 1], clamp=clamp), f)
            v = branch(x)
            jacobian = torch.stack([
                torch.autograd.grad(v[0, c], branch.conv1.weight, retain_graph=True)[0].flatten() for c in range(3)
            ])
            norms.append(jacobian.norm(dim=0))
            products.append((g @ jacobian)[0] / (g.norm() * jacobian.norm(dim=0)).clamp(min=1e-30))
    norms, cosine = torch.stack(norms).view(2, 4, 27), torch.stack(products).view(2, 4, 27)
    zero = norms < 1e-3 * norms.square().mean().sqrt()
    assert result["fitted_samples"] == 0
    assert result["distributive_zero"] == pytest.approx(zero.float().mean((1, 2)).tolist(), abs=1e-6)
    assert result["distributive_zero"][1] == 1
    orthogonal = (~zero & (cosine.abs() < 0.05)).float().mean((1, 2))
    assert result["orthogonal"] == pytest.approx(orthogonal.tolist(), abs=0.01)
