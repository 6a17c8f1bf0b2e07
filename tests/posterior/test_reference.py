"""NUTS, refined and plain Pyro against stored reference posteriors of a multinomial-logit family."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bayescam.diagnose.arviz_compat import ess
from bayescam.posterior.laplace import fit_laplace
from bayescam.posterior.nuts import sample_nuts

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "reference"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def script():
    path = ROOT / "scripts" / "reference_posteriors.py"
    spec = importlib.util.spec_from_file_location("reference_posteriors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_family_is_there():
    assert set(NAMES) <= set(script().FAMILY)
    assert {"iris", "spiral"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_reference_meets_posteriordbs_criteria(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    diagnostics = stored["diagnostics"]
    assert diagnostics["num_draws"] == 10_000
    assert diagnostics["rhat_max"] < 1.01
    assert diagnostics["lag_one_max"] < 0.05
    assert diagnostics["e_bfmi_min"] > 0.2
    assert diagnostics["num_divergent"] == 0
    for k in range(stored["num_features"]):
        total = sum(stored["parameters"][f"weight[{c},{k}]"]["mean"] for c in range(stored["num_classes"]))
        assert total == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_nuts_finds_the_reference(name):
    stored = json.loads((FOLDER / f"{name}.json").read_text())
    tools = script()
    features, labels = tools.data(name)
    assert features.shape == (stored["num_rows"], stored["num_features"])
    laplace = fit_laplace(features, labels, prior_precision=stored["prior_precision"])
    run = sample_nuts(laplace, features, labels, num_samples=500, seed=7, progress=False)
    found = tools.scalars(run.draws.weight, run.draws.bias, features, labels)
    assert set(found) == set(stored["parameters"])
    # At most 43 scalars, two numbers each, within five standard errors: a false alarm has a probability below 1e-4.
    for key, values in found.items():
        reference = stored["parameters"][key]
        error = np.hypot(values.std() / np.sqrt(ess(values, "mean")), reference["mean_mcse"])
        assert abs(values.mean() - reference["mean"]) < 5 * error, key
        squares = (values - values.mean()) ** 2
        spread = squares.std() / np.sqrt(ess(squares, "mean")) / (2 * values.std())
        assert abs(values.std() - reference["sd"]) < 5 * np.hypot(spread, reference["sd_mcse"]), key


@pytest.mark.slow
def test_pyros_own_nuts_on_the_model_finds_the_reference():
    import pyro
    from pyro.infer import MCMC, NUTS

    from bayescam.posterior.model import last_layer

    stored = json.loads((FOLDER / "spiral.json").read_text())
    tools = script()
    features, labels = tools.data("spiral")
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(last_layer), num_samples=250, warmup_steps=120, disable_progbar=True)
    mcmc.run(features, labels, num_classes=4, prior_precision=torch.tensor(stored["prior_precision"]).double())
    drawn = mcmc.get_samples(group_by_chain=True)
    found = tools.scalars(drawn["weight"], drawn["bias"], features, labels)
    for key, values in found.items():
        reference = stored["parameters"][key]
        error = np.hypot(values.std() / np.sqrt(ess(values, "mean")), reference["mean_mcse"])
        assert abs(values.mean() - reference["mean"]) < 5 * error, key
