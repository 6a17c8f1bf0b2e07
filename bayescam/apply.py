"""A finished run applied to new images: ``bayescam predict`` and ``bayescam explain``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayescam.backbone.network import Backbone
from bayescam.data.image import ImageError, read_image
from bayescam.data.pixels import Geometry
from bayescam.doctor import resolve_device
from bayescam.errors import BayescamError, UsageError
from bayescam.explain.cam import CamPosterior
from bayescam.explain.gradcam import explanation_maps
from bayescam.posterior.draws import Draws
from bayescam.posterior.laplace import Laplace
from bayescam.posterior.predictive import predict_proba
from bayescam.runfolder import of_images, verified
from bayescam.stages.state import chosen_posterior, load_posterior
from bayescam.storage import atomic_path, printable, read_json

_DRAWS = 4000


@dataclass(frozen=True)
class LoadedRun:
    """What a run folder gives to new images: the network, the posterior that its verdict chose, the class names."""

    backbone: Backbone
    posterior: Laplace | Draws
    classes: tuple[str, ...]
    method: str
    verdict: str
    device: str


@dataclass(frozen=True)
class Prediction:
    """What the posterior says of one image.

    Args:
        image: the file's name.
        probabilities: posterior mean of the softmax, per class.
        lower, upper: 5 % and 95 % posterior quantiles, per class.
        entropy: of the mean probabilities, in nats.
        mutual_information: between label and weights, in nats: the part of the entropy that more data could remove.
        method: the posterior that was used.
        verdict: on the run's Laplace posterior; "undecided" where nothing checked the one that was used.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    entropy: float
    mutual_information: float
    method: str
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON: one entry a class, most probable first."""
        rows = sorted(zip(self.classes, self.probabilities, self.lower, self.upper, strict=True), key=lambda r: -r[1])
        return {
            "image": self.image,
            "classes": [{"label": label, "probability": p, "interval_90": [low, high]} for label, p, low, high in rows],
            "entropy_nats": self.entropy,
            "mutual_information_nats": self.mutual_information,
            "posterior": self.method,
            "verdict": self.verdict,
        }


def load_run(run: Path, *, device: str = "auto") -> LoadedRun:
    """The network and the posterior of a complete run, checked against ``run.json``.

    Raises:
        BayescamError: not a complete run, or a file that was changed.
    """
    verified(of_images(run), "comparison.json", "backbone.safetensors")
    method, file = chosen_posterior(run)
    verified(run, file)
    verdict = read_json(run / "comparison.json")["verdict"]
    used = resolve_device(device)
    backbone, classes = Backbone.load(run / "backbone.safetensors")
    posterior = load_posterior(run, method)
    if (posterior.num_classes, posterior.num_features) != backbone.head.weight.shape:
        raise BayescamError(f"{run / file}: does not fit the run's backbone; run again")
    return LoadedRun(backbone.to(used), posterior, classes, method, verdict, used)


def _squares(run: LoadedRun, paths: Sequence[str]) -> tuple[list[np.ndarray], list[Geometry], Tensor]:
    """The images as read, where each lies in its square, and the squares (N, 1, S, S)."""
    images, unreadable = [], []
    for path in paths:
        try:
            images.append(read_image(path))
        except ImageError as error:
            unreadable.append(error)
    if unreadable:
        named = "; ".join(map(str, unreadable))
        raise BayescamError(f"{len(unreadable)} of {len(paths)} images cannot be read: {named}; leave them out")
    size = run.backbone.image_size
    geometries = [Geometry.fit(image.shape[0], image.shape[1], size) for image in images]
    squares = [geometry.to_square(image) for geometry, image in zip(geometries, images, strict=True)]
    return images, geometries, torch.as_tensor(np.stack(squares), dtype=torch.float32)[:, None]


def predict_images(run: LoadedRun, paths: Sequence[str]) -> list[Prediction]:
    """Class probabilities with 90 % credible intervals, entropy and mutual information, in the order of ``paths``.

    Raises:
        BayescamError: images that cannot be read, all of them named; nothing is predicted.
    """
    from bayescam.diagnose.calibration import entropy

    _, _, squares = _squares(run, paths)
    with run.backbone.evaluating():
        features = run.backbone.pool(run.backbone.maps(squares.to(run.device))).cpu().double()
    draws = run.posterior.sample(_DRAWS, seed=0) if isinstance(run.posterior, Laplace) else run.posterior
    weight, bias = draws.flat()
    predictions = []
    for path, phi in zip(paths, features, strict=True):
        probs = torch.softmax(weight.double() @ phi + bias.double(), dim=-1)
        mean = (
            run.posterior.predict_proba(phi[None])[0]
            if isinstance(run.posterior, Laplace)
            else predict_proba(draws, phi[None])[0]
        ).double()
        low, high = torch.quantile(probs, torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
        average = probs.mean(0)
        information = float(entropy(average[None])[0] - entropy(probs).mean())
        predictions.append(
            Prediction(
                printable(str(path)),
                tuple(printable(name) for name in run.classes),
                tuple(mean.tolist()),
                tuple(low.tolist()),
                tuple(high.tolist()),
                float(entropy(mean[None])[0]),
                max(information, 0.0),
                run.method,
                run.verdict,
            )
        )
    return predictions


def prediction_table(predictions: Sequence[Prediction]) -> str:
    """The predictions for a terminal."""
    from bayescam.report.wording import NAMES

    width = max(len(name) for name in predictions[0].classes)
    lines = [f"posterior: {NAMES[predictions[0].method]}; probability [90 % credible interval]"]
    if predictions[0].verdict == "undecided":
        lines.append("nothing checked this posterior, as NUTS did not converge: run again with --preset thorough")
    for prediction in predictions:
        lines.append(
            f"\n{prediction.image}\n  entropy {prediction.entropy:.3f} nat, "
            f"mutual information {prediction.mutual_information:.3f} nat"
        )
        for row in prediction.to_dict()["classes"]:
            low, high = row["interval_90"]
            bar = "█" * round(20 * row["probability"])
            lines.append(f"  {row['label']:<{width}}  {row['probability']:.3f}  [{low:.3f}, {high:.3f}]  {bar}")
    return "\n".join(lines)


def explain_images(
    run: LoadedRun, paths: Sequence[str], out: Path, *, label: str | None = None, overwrite: bool = False
) -> Iterator[str]:
    """Write one overlay figure an image into ``out``; yields what was written.

    The files are numbered in the order of ``paths``: no output name is made from an input name.

    Raises:
        BayescamError: images that cannot be read, all of them named.
        UsageError: unknown label, a picture is there already, or ``out`` is a file or a run folder.
    """
    from bayescam.report.cam_figures import case_figure

    if label is not None and label not in run.classes:
        raise UsageError(f"--label {label!r}: not a class of this run; take one of {', '.join(run.classes)}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")
    if (out / "run.json").exists():
        raise UsageError(f"--out {out}: is a run folder, which holds its own files alone; name another")
    files = [out / f"cam-{number:03d}.png" for number in range(1, len(paths) + 1)]
    standing = [file for file in files if file.exists()]
    if standing and not overwrite:
        raise UsageError(f"{standing[0]}: exists; name another --out or say --overwrite")
    predictions = predict_images(run, paths)
    images, geometries, squares = _squares(run, paths)
    maps = explanation_maps(run.backbone, squares.to(run.device)).cpu().double()
    posterior = CamPosterior(maps, run.posterior)
    shown = [run.classes.index(label) if label else int(np.argmax(p.probabilities)) for p in predictions]
    rows = torch.arange(len(shown))
    limit = float(posterior.mean[rows, shown].abs().max())
    spread = float(posterior.sd[rows, shown].max())
    for row, (prediction, file, k) in enumerate(zip(predictions, files, shown, strict=True)):
        likeliest = int(np.argmax(prediction.probabilities))
        figure = case_figure(
            images[row],
            posterior.select([row]),
            label=k,
            classes=prediction.classes,
            probabilities=prediction.probabilities,
            interval=(prediction.lower[likeliest], prediction.upper[likeliest]),
            geometry=geometries[row],
            limit=limit,
            spread=spread,
            title=prediction.image,
        )
        with atomic_path(file) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
        yield f"wrote {file}  ({prediction.image}, {prediction.classes[k]} {prediction.probabilities[k]:.3f})"
