"""``bayescam posterior``: Laplace, refine, NUTS, comparison and verdict for ready-made features, without any image."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayescam import __version__
from bayescam.errors import UsageError
from bayescam.runfolder import RunFolder, clear, locked, recorded, refuse_foreign, sweep, verified
from bayescam.storage import is_partial, printable, read_json, sha256_of, write_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from bayescam.data.feature_table import FeatureTable
    from bayescam.diagnose.compare import Comparison
    from bayescam.posterior.laplace import Laplace
    from bayescam.posterior.nuts import Nuts

_LEVEL = 0.9
_SETTINGS = "settings.json"
_WRITTEN = """settings.json metrics.json comparison.json diagnostics.json table.md timings.json posterior run.json .lock
    .scratch""".split()


@dataclass(frozen=True)
class FeaturesSettings:
    """Everything that decides the numbers of a run on features.

    Args:
        prior_precision: tau, or "evidence".
        num_chains, num_samples, num_warmup, kernel: of NUTS.
        sample_tau: put Gamma(1, rate 0.1) on tau and add the row "nuts_hierarchical".
        standardise: subtract the training mean of each feature and divide by its training sd.
        seed: of the split and of all draws.
        num_laplace_samples: draws of each Gaussian in its NetCDF file.
    """

    prior_precision: float | str = "evidence"
    num_chains: int = 4
    num_samples: int = 500
    num_warmup: int = 150
    kernel: str = "nuts"
    sample_tau: bool = False
    standardise: bool = False
    seed: int = 0
    num_laplace_samples: int = 500


def add_parser(commands: Any) -> None:
    """The subcommand ``posterior``."""
    parser = commands.add_parser(
        "posterior",
        help="the posterior and the verdict for ready-made features, without images",
        description="Laplace, refine, NUTS and the verdict on Laplace for features of any network or tabular data.",
    )
    parser.add_argument(
        "--features",
        type=Path,
        required=True,
        help=".npz with features, labels (and test_features, test_labels; patients, test_patients), or .csv whose last "
        "column is the label (and one column named patient); named patients are held out and resampled whole",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the draws (default: 0)")
    parser.add_argument("--prior-precision", default="evidence", help="tau, or evidence (the default)")
    parser.add_argument("--sample-tau", action="store_true", help="also sample tau under Gamma(1, rate 0.1)")
    parser.add_argument("--standardise", action="store_true", help="scale each feature to mean 0, sd 1 (tabular data)")
    parser.add_argument("--num-chains", type=int, default=4, help="NUTS chains (default: 4)")
    parser.add_argument("--num-samples", type=int, default=500, help="draws a chain (default: 500)")
    parser.add_argument("--num-warmup", type=int, default=150, help="warm-up draws a chain (default: 150)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes for the chains (default: 0, in turn)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, ...")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run: finished chains are kept")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.set_defaults(handler=_posterior)


def _posterior(parsed: argparse.Namespace) -> int:
    tau = parsed.prior_precision
    if tau != "evidence":
        try:
            tau = float(tau)
        except ValueError as error:
            raise UsageError(f"--prior-precision {tau}: give a positive number or evidence") from error
    settings = FeaturesSettings(
        prior_precision=tau,
        num_chains=parsed.num_chains,
        num_samples=parsed.num_samples,
        num_warmup=parsed.num_warmup,
        sample_tau=parsed.sample_tau,
        standardise=parsed.standardise,
        seed=parsed.seed,
    )
    if parsed.resume and parsed.overwrite:
        raise UsageError("--resume and --overwrite exclude each other: say one")
    print(
        run_features(
            parsed.features,
            parsed.out,
            settings,
            num_workers=parsed.num_workers,
            device=parsed.device,
            resume=parsed.resume,
            overwrite=parsed.overwrite,
        )
    )
    return 0


def run_features(
    path: Path,
    out: Path,
    settings: FeaturesSettings | None = None,
    *,
    num_workers: int = 0,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """Run everything on the features in ``path``; returns what to tell the user.

    Writes ``posterior/laplace.safetensors``, ``refined.safetensors``, ``nuts.safetensors`` and the same as NetCDF,
    ``metrics.json``, ``comparison.json``, ``diagnostics.json``, ``table.md``, ``timings.json``, ``settings.json``, and
    last ``run.json`` with the SHA-256 of each.

    Raises:
        FileFormatError: the features cannot be read.
        UsageError: a setting is out of range, or the folder is not usable.
        BayescamError: another process runs in it, or (on resume) a file of a complete run is not what it was.
    """
    from bayescam.data.feature_table import read_features
    from bayescam.doctor import resolve_device

    settings = settings or FeaturesSettings()
    _check_ranges(settings, num_workers)
    used = resolve_device(device)
    table = read_features(path, seed=settings.seed)
    decisive = {**asdict(settings), "features_sha256": sha256_of(path)}
    held = check_folder(out, decisive, resume=resume, overwrite=overwrite)
    with locked(out):
        if resume and (out / "run.json").is_file():
            verified(out, *recorded(out))
            return f"{out}: this run is complete; nothing to do"
        if held and overwrite:
            clear(out, last=_SETTINGS)
        sweep(out)
        write_text(out / _SETTINGS, json.dumps(decisive, indent=1))
        return _stages(_standardised(table) if settings.standardise else table, out, settings, num_workers, used)


def _check_ranges(settings: FeaturesSettings, num_workers: int) -> None:
    """Refuse numbers that nobody means before anything is read or written."""
    ranges = {
        "seed": (settings.seed, 0, 2**31 - 1),
        "num_chains": (settings.num_chains, 1, 10_000),
        "num_samples": (settings.num_samples, 4, 10_000_000),
        "num_warmup": (settings.num_warmup, 20, 10_000_000),
        "num_workers": (num_workers, 0, 1024),
    }
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a whole number from {low} to {high}")
    tau = settings.prior_precision
    if tau != "evidence" and not (isinstance(tau, int | float) and 0 < tau < math.inf):
        raise UsageError(f"--prior-precision {tau}: give a positive number or evidence")


def _stages(table: FeatureTable, out: Path, settings: FeaturesSettings, num_workers: int, device: str) -> str:
    import torch

    from bayescam.diagnose.compare import json_safe

    folder = RunFolder(out)
    seconds: dict[str, float] = {}
    train = torch.as_tensor(table.features).to(device), torch.as_tensor(table.labels).to(device)
    test = torch.as_tensor(table.test_features).to(device), torch.as_tensor(table.test_labels).to(device)
    gaussians = _fit(train, len(table.classes), settings, seconds)
    chains = {"nuts": _sample(train, gaussians, settings, None, out, num_workers, seconds)}
    if settings.sample_tau:
        chains["nuts_hierarchical"] = _sample(train, gaussians, settings, "gamma", out, num_workers, seconds)
    with _timed("metrics", seconds):
        metrics = _metrics(table, test[0], gaussians, chains)
    with _timed("compare", seconds):
        comparison = _compare(table, train, test, gaussians, chains["nuts"])
    with _timed("arviz", seconds):
        _save_posteriors(out, table, train, test, gaussians, chains, settings)
    write_text(out / "metrics.json", json.dumps(json_safe(metrics), indent=1, allow_nan=False))
    write_text(out / "comparison.json", json.dumps(comparison.to_dict(), indent=1, allow_nan=False))
    write_text(out / "diagnostics.json", json.dumps(_diagnostics(chains, comparison), indent=1))
    write_text(out / "table.md", _markdown(metrics))
    write_text(out / "timings.json", json.dumps({"seconds": seconds}, indent=1))
    folder.complete({"bayescam": __version__, "seed": settings.seed})
    return f"{_markdown(metrics)}\nVerdict: {comparison.verdict}. {comparison.words}\nwrote {out}"


def check_folder(out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> list[str]:
    """What stands in the folder.

    Raises:
        UsageError: it is no such run, something was finished in it, or it was begun with other settings.
        FileFormatError: its settings cannot be read.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")
    held = sorted(e.name for e in out.iterdir() if e.name != ".lock" and not is_partial(e)) if out.is_dir() else []
    if held and not _is_ours(out / _SETTINGS):
        raise UsageError(
            f"--out {out}: the folder holds files that are not such a run ({printable(held[0])}); name another"
        )
    if held not in ([], [_SETTINGS]) and not resume and not overwrite:
        raise UsageError(f"--out {out}: the folder is not empty; name another, or say --resume or --overwrite")
    if overwrite:
        refuse_foreign(out, held, _WRITTEN)
    elif resume and held:
        _check_settings(out, settings)
    return held


def _is_ours(settings: Path) -> bool:
    return settings.is_file() and "features_sha256" in read_json(settings)


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    stored = read_json(out / _SETTINGS)
    for name, now in settings.items():
        if stored.get(name) != now:
            raise UsageError(
                f"--resume {out}: {name} was {stored.get(name)!r} and is now {now!r}; resume with what it was"
            )


def _standardised(table: FeatureTable) -> FeatureTable:
    import numpy as np

    largest = np.abs(table.features).max(0)
    largest[largest == 0] = 1
    scaled = table.features / largest
    mean, sd = scaled.mean(0) * largest, scaled.std(0) * largest
    sd[sd == 0] = 1
    return replace(table, features=(table.features - mean) / sd, test_features=(table.test_features - mean) / sd)


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begun, 3)


def _fit(
    train: tuple[Tensor, Tensor], num_classes: int, settings: FeaturesSettings, seconds: dict[str, float]
) -> dict[str, Laplace]:
    """The Gaussians, all at the tau of the full one."""
    from bayescam.posterior.laplace import fit_laplace

    with _timed("laplace_full", seconds):
        full = fit_laplace(*train, num_classes=num_classes, prior_precision=settings.prior_precision)
    gaussians = {}
    for structure in ("diag", "kron"):
        with _timed(f"laplace_{structure}", seconds):
            gaussians[f"laplace_{structure}"] = fit_laplace(
                *train, num_classes=num_classes, prior_precision=full.prior_precision, structure=structure
            )
    gaussians["laplace_full"] = full
    with _timed("laplace_refined", seconds):
        gaussians["laplace_refined"] = full.refine(*train)
    return gaussians


def _sample(
    train: tuple[Tensor, Tensor],
    gaussians: dict[str, Laplace],
    settings: FeaturesSettings,
    tau_prior: Any,
    out: Path,
    num_workers: int,
    seconds: dict[str, float],
) -> Nuts:
    from bayescam.posterior.nuts import sample_nuts

    name = "nuts" if tau_prior is None else "nuts_hierarchical"
    with _timed(name, seconds):
        return sample_nuts(
            gaussians["laplace_refined"],
            *train,
            num_chains=settings.num_chains,
            num_samples=settings.num_samples,
            num_warmup=settings.num_warmup,
            kernel="hmc" if settings.kernel == "hmc" else "nuts",
            tau_prior=tau_prior,
            seed=settings.seed,
            num_workers=num_workers,
            folder=RunFolder(out).scratch / name,
        )


def _metrics(
    table: FeatureTable, test_features: Tensor, gaussians: dict[str, Laplace], chains: dict[str, Nuts]
) -> dict[str, Any]:
    import torch

    from bayescam.diagnose.calibration import classification_metrics
    from bayescam.diagnose.intervals import count_groups, metrics_with_intervals
    from bayescam.posterior.predictive import predict_proba

    full = gaussians["laplace_full"]
    phi = test_features.to(full.weight_mean)
    proba = {"map": torch.softmax(phi @ full.weight_mean.T + full.bias_mean, 1)}
    proba |= {name: gaussian.predict_proba(phi) for name, gaussian in gaussians.items()}
    proba |= {name: predict_proba(run.draws, phi) for name, run in chains.items()}
    found = {name: probs.cpu().double().numpy() for name, probs in proba.items()}
    intervals = {
        name: metrics_with_intervals(probs, table.test_labels, _drawn_together(table), level=_LEVEL)
        for name, probs in found.items()
    }
    return {
        "methods": {name: classification_metrics(probs, table.test_labels) for name, probs in found.items()},
        "interval_level": _LEVEL,
        "resampled": "rows" if table.test_patients is None else "patients",
        "num_resampled": count_groups(_drawn_together(table)),
        "intervals": {name: {metric: asdict(one) for metric, one in row.items()} for name, row in intervals.items()},
        "num_train": len(table.labels),
        "num_test": len(table.test_labels),
        "num_features": table.features.shape[1],
        "classes": list(table.classes),
        "prior_precision": full.prior_precision,
        "log_evidence": full.log_evidence,
        "notes": list(full.notes),
    }


def _drawn_together(table: FeatureTable) -> np.ndarray:
    """What the bootstrap draws whole: the patients, or each row by itself where the file names none."""
    return table.test_rows if table.test_patients is None else table.test_patients


def _compare(
    table: FeatureTable,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    gaussians: dict[str, Laplace],
    nuts: Nuts,
) -> Comparison:
    from bayescam.diagnose.compare import compare_posteriors

    return compare_posteriors(
        gaussians["laplace_full"],
        nuts,
        *test,
        refined=gaussians["laplace_refined"],
        training=train,
        patients=_drawn_together(table),
    )


def _save_posteriors(
    out: Path,
    table: FeatureTable,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    gaussians: dict[str, Laplace],
    chains: dict[str, Nuts],
    settings: FeaturesSettings,
) -> None:
    from bayescam.diagnose.inference_data import save, to_inference_data

    folder = out / "posterior"
    files: dict[str, Laplace | Nuts] = {
        "laplace": gaussians["laplace_full"],
        "refined": gaussians["laplace_refined"],
        **chains,
    }
    for name, posterior in files.items():
        posterior.save(folder / f"{name}.safetensors")
        data = to_inference_data(
            posterior,
            *test,
            train=train,
            classes=list(table.classes),
            obs_ids=[f"row-{i}" for i in table.test_rows],
            num_samples=settings.num_laplace_samples,
            seed=settings.seed,
        )
        save(data, folder / f"{name}.nc")


def _diagnostics(chains: dict[str, Nuts], comparison: Comparison) -> dict[str, Any]:
    """The numbers of NUTS that must be looked at before anything is believed."""
    from bayescam.diagnose.convergence import convergence, energy_fraction

    found: dict[str, Any] = {}
    for name, run in chains.items():
        centred = convergence(run.draws.centred().theta().cpu().numpy())
        found[name] = {
            "weights": asdict(centred),
            "lp": asdict(convergence(run.stats["lp"])),
            "e_bfmi": energy_fraction(run.stats["energy"]),
            "num_divergent": run.num_divergent,
            "tree_depth_max": int(run.stats["tree_depth"].max()),
            "steps_per_draw": float(run.stats["n_steps"].mean()),
            "acceptance_rate": float(run.stats["acceptance_rate"].mean()),
            "num_gradients": run.num_gradients,
        }
        if run.tau is not None:
            tau = run.tau.cpu().numpy()
            found[name]["tau"] = {"mean": float(tau.mean()), "sd": float(tau.std()), **asdict(convergence(tau))}
    found["nuts"]["probabilities"] = comparison.to_dict()["convergence"]["probabilities"]
    return found


def _markdown(metrics: dict[str, Any]) -> str:
    from bayescam.diagnose.intervals import Interval, interval_words
    from bayescam.report.wording import NAMES

    lines = [
        f"{metrics['num_train']} rows to train, {metrics['num_test']} to test, {metrics['num_features']} features, "
        f"{len(metrics['classes'])} classes, prior precision {metrics['prior_precision']:.4g}."
        + (" The file names no patients. " if metrics["resampled"] == "rows" else " ")
        + interval_words(metrics["num_resampled"], metrics["resampled"], metrics["interval_level"]),
        "",
        "| method | accuracy | NLL | ECE | Brier |",
        "|---|---|---|---|---|",
    ]
    for name, found in metrics["intervals"].items():
        row = {metric: Interval(**one) for metric, one in found.items()}
        cells = [f"{row['accuracy']:.3f}", *(f"{row[key]:.4f}" for key in ("nll", "ece", "brier"))]
        lines.append(f"| {' | '.join([NAMES.get(name, name), *cells])} |")
    return "\n".join(lines) + "\n"
