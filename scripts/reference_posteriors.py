"""What is the posterior, to many digits? A small multinomial-logit family, by long runs under posteriordb's criteria.

    python scripts/reference_posteriors.py --out tests/posterior/reference

Each JSON file says how the data are made, the model, the settings of the run, its diagnostics, and for every centred
parameter and the log-likelihood the mean, sd, their Monte Carlo standard errors, and the 5, 50 and 95 % quantiles. The
criteria (posteriordb, REFERENCE_POSTERIOR_DEFINITION.md): 10,000 kept draws, every R-hat below 1.01, every lag-1
autocorrelation below .05 in size, E-BFMI above .2, no divergence. A run that misses one is not written. Takes minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayescam.diagnose.arviz_compat import ess, rhat
from bayescam.diagnose.convergence import energy_fraction
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts
from bayescam.storage import write_text

CHAINS, KEPT, THIN, WARMUP, ACCEPT = 10, 1000, 8, 500, 0.95


def standardised(name: str) -> tuple[Tensor, Tensor]:
    """A scikit-learn data set with each feature scaled to mean 0 and sd 1 (division by N)."""
    from sklearn import datasets

    features, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    return torch.from_numpy(features), torch.from_numpy(labels)


def spiral(num: int = 60, num_classes: int = 4) -> tuple[Tensor, Tensor]:
    """Nearly separable rows without any random number: phi_n = (cos a_n, sin a_n) r_n, y_n by the angle."""
    n = torch.arange(num, dtype=torch.float64)
    angle = 2 * math.pi * (n * (math.sqrt(5) - 1) / 2 % 1)
    radius = 0.5 + 2 * (n / num)
    features = torch.stack([angle.cos() * radius, angle.sin() * radius], 1)
    return features, (angle / (2 * math.pi) * num_classes).long()


# name -> (how the data are made, prior precision)
FAMILY = {
    "iris": ("scikit-learn iris, standardised", 1.0),
    "wine": ("scikit-learn wine, standardised", 1.0),
    "spiral": ("spiral(60, 4) of scripts/reference_posteriors.py: nearly separable", 0.1),
}


def data(name: str) -> tuple[Tensor, Tensor]:
    return spiral() if name == "spiral" else standardised(name)


def scalars(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """Centred parameters and the log-likelihood of draws (C, S, K, D), each (C, S)."""
    weight, bias = weight - weight.mean(2, keepdim=True), bias - bias.mean(2, keepdim=True)
    out = {
        f"weight[{k},{d}]": weight[..., k, d].numpy() for k in range(weight.shape[2]) for d in range(weight.shape[3])
    }
    out |= {f"bias[{k}]": bias[..., k].numpy() for k in range(bias.shape[2])}
    log_proba = (weight @ features.T + bias.unsqueeze(-1)).log_softmax(2)
    rows = torch.arange(len(labels))
    out["log_likelihood"] = log_proba[:, :, labels, rows].sum(-1).numpy()
    return out


def summary(values: np.ndarray) -> dict[str, float]:
    mean, sd = values.mean(), values.std(ddof=1)
    squares = (values - mean) ** 2
    return {
        "mean": float(mean),
        "mean_mcse": float(sd / np.sqrt(ess(values, "mean"))),
        "sd": float(sd),
        "sd_mcse": float(squares.std() / np.sqrt(ess(squares, "mean")) / (2 * sd)),
        **{f"q{q}": float(np.quantile(values, q / 100)) for q in (5, 50, 95)},
    }


def lag_one(values: np.ndarray) -> float:
    centred = values - values.mean(1, keepdims=True)
    return float((centred[:, 1:] * centred[:, :-1]).mean() / np.square(centred).mean())


def reference(name: str, seed: int) -> dict[str, object]:
    """Means, sds and their errors of one member of the family, from a long thinned run."""
    recipe, tau = FAMILY[name]
    features, labels = data(name)
    refined = fit_laplace(features, labels, prior_precision=tau).refine(features, labels)
    run = sample_nuts(
        refined,
        features,
        labels,
        num_chains=CHAINS,
        num_samples=KEPT * THIN,
        num_warmup=WARMUP,
        seed=seed,
        target_accept=ACCEPT,
    )
    kept = scalars(run.draws.weight[:, ::THIN], run.draws.bias[:, ::THIN], features, labels)
    diagnostics = {
        "num_draws": CHAINS * KEPT,
        "rhat_max": max(float(rhat(v)) for v in kept.values()),
        "ess_bulk_min": min(float(ess(v)) for v in kept.values()),
        "lag_one_max": max(abs(lag_one(v)) for v in kept.values()),
        "e_bfmi_min": min(energy_fraction(run.stats["energy"])),
        "num_divergent": run.num_divergent,
    }
    met = (
        diagnostics["rhat_max"] < 1.01
        and diagnostics["lag_one_max"] < 0.05
        and diagnostics["e_bfmi_min"] > 0.2
        and diagnostics["num_divergent"] == 0
    )
    if not met:
        raise SystemExit(f"{name}: the criteria are not met: {diagnostics}")
    return {
        "name": name,
        "data": recipe,
        "model": "y_n ~ Categorical(softmax(W phi_n + b)); weights, biases ~ Normal(0, 1/tau); centred over classes",
        "prior_precision": tau,
        "num_rows": len(labels),
        "num_features": features.shape[1],
        "num_classes": int(labels.max()) + 1,
        "sampler": {
            "kernel": "nuts",
            "chains": CHAINS,
            "kept": KEPT,
            "thin": THIN,
            "warmup": WARMUP,
            "target_accept": ACCEPT,
            "seed": seed,
        },
        "diagnostics": diagnostics,
        "parameters": {key: summary(values) for key, values in kept.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/posterior/reference"))
    parser.add_argument("--seed", type=int, default=2026, help="of the chains; the data have none")
    parser.add_argument("--only", choices=sorted(FAMILY), nargs="*", default=sorted(FAMILY))
    parsed = parser.parse_args()
    for name in parsed.only:
        found = reference(name, parsed.seed)
        write_text(parsed.out / f"{name}.json", json.dumps(found, indent=1) + "\n")
        print(name, found["diagnostics"])


if __name__ == "__main__":
    main()
