"""Every term of the report, explained once; the page links to it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Term:
    """A term as the glossary heads it, and what it means."""

    name: str
    words: str


GLOSSARY: dict[str, Term] = {
    "cnn": Term("CNN", "The convolutional neural network as it was trained, its last layer included."),
    "posterior": Term(
        "posterior",
        "What the training images leave open of the last layer's weights: a distribution over weights in place of one "
        "best set. Everything unsure on this page is unsure because of it.",
    ),
    "map": Term(
        "MAP",
        "Maximum a posteriori: the last layer at its single most probable weights, refitted on the frozen network. "
        "With a temperature: its logits divided by one number, fitted on the valid split.",
    ),
    "laplace": Term(
        "Laplace",
        "A Gaussian around the MAP, as wide as the curvature there says; with the full covariance of all weights, or "
        "its Kronecker or diagonal approximation.",
    ),
    "refined": Term(
        "refined",
        "The Gaussian nearest to the posterior (in Kullback-Leibler divergence), found from Laplace by Newton steps.",
    ),
    "nuts": Term(
        "NUTS",
        "The No-U-Turn Sampler, a Hamiltonian Monte Carlo method: draws from the posterior itself, without assuming a "
        "shape. It is slow, and here the reference that the Gaussians are held to.",
    ),
    "prior": Term(
        "prior precision",
        "How strongly weights are held to 0 before any image is seen: 1 / the variance of their prior. Found from the "
        "training images alone, by the evidence, unless it was set.",
    ),
    "logit": Term(
        "logit",
        "A class's score before probabilities are made of the scores; only differences between classes matter. A "
        "difference of 1 multiplies the odds by 2.7, of 5 by 150.",
    ),
    "cam": Term(
        "CAM",
        "Class activation map: the part of a class's logit that each cell of the last feature map contributes. The "
        "class's logit is the mean of its map over the cells, and a bias. 0 is the mean of all classes: above it a "
        "cell speaks for the class, below it for others. Grad-CAM is its like for other networks.",
    ),
    "above_mean": Term(
        "stands out",
        "A cell stands out where it gives the class more evidence than the average cell of the same picture. It "
        "answers “where?” also where the whole picture speaks for the class.",
    ),
    "together": Term(
        "all at once",
        "A region all of whose cells are beyond the level together, with the stated probability. “Each by itself” "
        "says it of one cell at a time: among many such cells some will be wrong.",
    ),
    "interval": Term(
        "90 % interval",
        "Of accuracy, NLL and their like: how far the number moves when other patients (or images) are drawn, by the "
        "bootstrap. Of a probability or a weight: what holds 90 % of the posterior.",
    ),
    "accuracy": Term("accuracy", "The share of images whose most probable class is the true one."),
    "nll": Term(
        "NLL",
        "Negative log-likelihood: the mean of -log of the probability that was given to the truth, in nat. Small is "
        "good; 0.69 is the price of saying 50 % each time.",
    ),
    "ece": Term(
        "ECE",
        "Expected calibration error: how far the stated confidence is from the share that is right, a mean over 15 "
        "bins of confidence. Small is good; chance alone lifts it in small samples.",
    ),
    "brier": Term(
        "Brier", "The squared distance of the probabilities to the truth, summed over classes. Small is good."
    ),
    "entropy": Term(
        "entropy", "How unsure a predicted distribution over classes is, in nat; 0 where one class has all."
    ),
    "mi": Term(
        "mutual information",
        "The part of the entropy that knowing the last layer's weights would take away: what more data could cure.",
    ),
    "auroc": Term(
        "AUROC",
        "The probability that a wrong image's number is above a right one's; 0.5 is chance.",
    ),
    "tv": Term(
        "total variation",
        "How far two predictions of an image lie apart: the largest difference in the probability of any set of "
        "classes; at 0.01 none differs by more than one percentage point. Here its mean over the test images.",
    ),
    "half": Term(
        "NUTS, half against half",
        "The first half of the draws against the second: what chance alone makes of the distance, the noise floor.",
    ),
    "centred": Term(
        "centred weight",
        "A weight less the mean over classes of that feature's weights, which softmax cannot see.",
    ),
    "lp": Term(
        "log joint", "The log of prior times likelihood at a draw, in nat; if chains differ in it, they differ."
    ),
    "rhat": Term(
        "R-hat",
        "How much chains differ from each other, beside how much each varies; 1 where they cannot be told apart.",
    ),
    "ess": Term(
        "ESS",
        "Effective sample size: how many independent draws the correlated ones are worth; bulk for means, tail for the "
        "ends of intervals.",
    ),
    "bfmi": Term(
        "E-BFMI",
        "How well the sampler's momentum explores the energies of the posterior; below 0.3 it may miss its tails.",
    ),
    "divergent": Term(
        "divergent transition",
        "A step on which the sampler's integration broke down; there the posterior may be explored badly.",
    ),
    "depth": Term("tree depth", "How far the sampler went before it turned; at the maximum it was cut off."),
    "pivot": Term(
        "pivot of the precision",
        "The smallest beside the largest of the numbers that the inverse covariance factors into; at rounding the "
        "Gaussian would be flat in some direction.",
    ),
    "decrement": Term(
        "Newton decrement",
        "How far the fitted mean is from the optimum, in posterior standard deviations.",
    ),
    "khat": Term(
        "k-hat",
        "How heavy the tail of the ratios of posterior to Gaussian is, over all weights at once; above 0.7 no "
        "reweighting of the Gaussian's draws would be reliable. It says nothing of the predictions.",
    ),
    "kl": Term("KL", "Kullback-Leibler divergence from the Gaussian to the posterior, over all weights, in nat."),
}

# Which term explains a check of the diagnosis: the first whose words are in the check's name.
_CHECKS = {
    "R-hat": "rhat",
    "ESS": "ess",
    "E-BFMI": "bfmi",
    "divergent": "divergent",
    "tree depth": "depth",
    "pivot": "pivot",
    "Newton decrement": "decrement",
    "gradient": "decrement",
    "k-hat": "khat",
    "KL": "kl",
    "total variation": "tv",
    "NLL": "nll",
    "prior sd": "prior",
}


def term_of_check(name: str) -> str | None:
    """The key of the term that explains a check, None where none does."""
    return next((key for words, key in _CHECKS.items() if words in name), None)
