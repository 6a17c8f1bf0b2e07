"""bayescam: a Bayesian last layer for radiograph classifiers, checked by NUTS, with maps that carry error bars.

Letters, used everywhere alike: N images, D features, K classes, h x w the feature map, U = h*w its cells, C chains,
S draws, P = K(D+1) parameters, tau prior precision. ``weight`` is (K, D), ``bias`` (K,), ``theta`` = weight row-major
then bias. ArviZ dims: chain, draw, label, feature, obs_id.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bayescam.backbone.network import Backbone, Features
    from bayescam.data.dataset import RadiographDataset, open_dataset
    from bayescam.data.image import ImageError, read_image
    from bayescam.diagnose.arviz_compat import summary
    from bayescam.diagnose.compare import Comparison, compare_posteriors
    from bayescam.diagnose.inference_data import to_inference_data
    from bayescam.diagnose.loo import leave_one_out
    from bayescam.errors import BayescamError
    from bayescam.explain.cam import CamPosterior
    from bayescam.posterior.draws import Draws
    from bayescam.posterior.guide import AutoLastLayerLaplace
    from bayescam.posterior.laplace import Laplace, fit_laplace, load_laplace
    from bayescam.posterior.model import last_layer
    from bayescam.posterior.nuts import Nuts, sample_nuts
    from bayescam.posterior.predictive import predict_proba

# Public name -> the module that defines it: imported on first use, so that `bayescam --help` needs no torch.
_HOME = {
    "BayescamError": "bayescam.errors",
    "ImageError": "bayescam.data.image",
    "read_image": "bayescam.data.image",
    "RadiographDataset": "bayescam.data.dataset",
    "open_dataset": "bayescam.data.dataset",
    "Backbone": "bayescam.backbone.network",
    "Features": "bayescam.backbone.network",
    "last_layer": "bayescam.posterior.model",
    "AutoLastLayerLaplace": "bayescam.posterior.guide",
    "Laplace": "bayescam.posterior.laplace",
    "fit_laplace": "bayescam.posterior.laplace",
    "load_laplace": "bayescam.posterior.laplace",
    "Draws": "bayescam.posterior.draws",
    "Nuts": "bayescam.posterior.nuts",
    "sample_nuts": "bayescam.posterior.nuts",
    "predict_proba": "bayescam.posterior.predictive",
    "CamPosterior": "bayescam.explain.cam",
    "to_inference_data": "bayescam.diagnose.inference_data",
    "summary": "bayescam.diagnose.arviz_compat",
    "leave_one_out": "bayescam.diagnose.loo",
    "Comparison": "bayescam.diagnose.compare",
    "compare_posteriors": "bayescam.diagnose.compare",
}

__all__ = [
    "AutoLastLayerLaplace",
    "Backbone",
    "BayescamError",
    "CamPosterior",
    "Comparison",
    "Draws",
    "Features",
    "ImageError",
    "Laplace",
    "Nuts",
    "RadiographDataset",
    "__version__",
    "compare_posteriors",
    "fit_laplace",
    "last_layer",
    "leave_one_out",
    "load_laplace",
    "open_dataset",
    "predict_proba",
    "read_image",
    "sample_nuts",
    "summary",
    "to_inference_data",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bayescam' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
