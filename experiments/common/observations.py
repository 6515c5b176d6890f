"""What the paper observes about branched networks (arXiv 2206.05810, section 4), in our words and numbering."""

OBSERVATIONS = {
    1: "Specialization: each branch answers to a part of the data; most of the others leave that part to it.",
    2: "Collaboration: some parts are shared by several branches, and idle ones can take a part over late.",
    3: "More branches succeed more often.",
    4: "Training makes the responses of different branches less correlated.",
    5: "The number of active branches hardly depends on M; the rest, growing linearly, falls silent.",
    6: "Training makes the Hessian nearly block-diagonal, one block a branch.",
    7: "Inter-class specialization: a branch is confident about some classes and not about others.",
    8: "Intra-class specialization: branches that serve one class differ in which of its samples they are sure of.",
}
