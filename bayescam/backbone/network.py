"""``Backbone``: any convolutional classifier read as maps -> pool -> head, and the frozen ``Features`` it yields."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayescam.backbone.architectures import SmallCNN, StudyCNN
from bayescam.backbone.graph import Split, last_linear, split
from bayescam.data.dataset import RadiographDataset
from bayescam.data.pixels import Pixels
from bayescam.errors import BayescamError, FileFormatError
from bayescam.notebook import html_table
from bayescam.storage import load_tensors, save_tensors

_OWN = {"small": (SmallCNN, 128), "study": (StudyCNN, 224)}
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_SD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Features:
    """What the frozen network says of N images, and all that the posterior ever sees of them.

    Args:
        features: phi, (N, D).
        labels: (N,) int64.
        ids: obs_id of each image.
        maps: (N, D', h, w) or None.
    """

    features: Tensor
    labels: Tensor
    ids: tuple[str, ...]
    maps: Tensor | None = None

    def select(self, indices: np.ndarray) -> Features:
        """The same for some of the images."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        maps = None if self.maps is None else self.maps[rows]
        return Features(self.features[rows], self.labels[rows], tuple(self.ids[i] for i in rows.tolist()), maps)

    def to(self, device: torch.device | str) -> Features:
        """The same on another device."""
        maps = None if self.maps is None else self.maps.to(device)
        return Features(self.features.to(device), self.labels.to(device), self.ids, maps)

    def __repr__(self) -> str:
        n, d = self.features.shape
        cells = "" if self.maps is None else f", maps {tuple(self.maps.shape[2:])}"
        return f"Features(images={n}, features={d}{cells})"

    def _repr_html_(self) -> str:
        n, d = self.features.shape
        maps = "none" if self.maps is None else " x ".join(str(side) for side in self.maps.shape[1:])
        rows = [("images", n), ("features", d), ("type", str(self.features.dtype)), ("maps of an image", maps)]
        return html_table("Features of the frozen network", rows)


def check_name(name: str) -> None:
    """Refuse a backbone that cannot be built by name.

    Raises:
        ValueError: unknown; the message lists what is known.
    """
    if name in _OWN:
        return
    from torchvision import models

    known = [*_OWN, *models.list_models(module=models)]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"take one of {', '.join(known)}"
        raise ValueError(f"backbone {name!r} is unknown: {hint}")


class Backbone(nn.Module):
    """A convolutional classifier read as maps(images) (N, D', h, w) -> pool (N, D) -> head (N, K).

    In eval mode head(pool(maps(x))) equals the network's own output. Where ``is_average`` holds, pool is the mean over
    the cells, D' = D and CAM is complete (Zhou et al. 2016).

    Args:
        name: "small", "study", or any torchvision classifier that ends in a linear layer ("resnet18", "densenet121",
            "efficientnet_b0", "mobilenet_v3_small", "vgg11", "alexnet", ...).
        num_classes: K >= 2.
        weights: None, a torchvision weights name ("DEFAULT", "IMAGENET1K_V1": downloaded by torchvision), or the path
            of a local safetensors file with the network's state.
        image_size: S, the side of the square the images are letterboxed to; None takes the network's own.

    Raises:
        ValueError: unknown name, K < 2.
        BayescamError: the weights cannot be had.
    """

    def __init__(
        self, name: str, num_classes: int, weights: str | None = None, *, image_size: int | None = None
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        net, native_size = _build(name, num_classes, weights)
        self._adopt(net, name, image_size or native_size, maps=None, head=last_linear(net))

    @classmethod
    def from_module(
        cls, net: nn.Module, *, maps: str | None = None, head: str | None = None, image_size: int = 224
    ) -> Backbone:
        """A user's own network.

        Args:
            net: takes (N, 1, S, S) or (N, 3, S, S) images, returns (N, K) logits from a final ``nn.Linear``.
            maps: dotted name of the module whose output are the feature maps; None takes what enters the last average
                pooling.
            head: dotted name of the final linear layer; None takes the last ``nn.Linear``.
            image_size: S.

        Raises:
            ValueError: the network cannot be cut there; the message says why.
        """
        backbone = cls.__new__(cls)
        nn.Module.__init__(backbone)
        backbone._adopt(net, "module", image_size, maps=maps, head=head or last_linear(net))
        return backbone

    def _adopt(self, net: nn.Module, name: str, image_size: int, *, maps: str | None, head: str) -> None:
        layer = net.get_submodule(head)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"head={head!r} is a {type(layer).__name__}, not an nn.Linear")
        self.net = net
        self.name = name
        self.image_size = image_size
        self._head_name = head
        first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        self._channels = first.in_channels
        # The two graphs share the network's layers; held in a tuple so that they are not registered twice.
        self._split: tuple[Split] = (split(net, head=head, maps=maps),)

    def __repr__(self) -> str:
        size = f"image_size={self.image_size}, classes={self.num_classes}, features={self.num_features}"
        return f"Backbone({self.name!r}, {size}, parameters={sum(p.numel() for p in self.parameters())})"

    def _repr_html_(self) -> str:
        rows = [
            ("image size", f"{self.image_size} x {self.image_size}"),
            ("classes, features", f"{self.num_classes}, {self.num_features}"),
            ("parameters", f"{sum(p.numel() for p in self.parameters()):,}"),
            ("pool", "the mean over the cells: CAM" if self.is_average else "not a mean: Grad-CAM"),
            ("last layer", self._head_name),
        ]
        return html_table(f"Backbone {self.name}", rows)

    @property
    def head(self) -> nn.Linear:
        layer = self.net.get_submodule(self._head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    @property
    def num_features(self) -> int:
        return self.head.in_features

    @property
    def is_average(self) -> bool:
        """Whether pool is the plain mean over the cells."""
        return self._split[0].is_average

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of images (N, 1, S, S) in [0, 1]."""
        return self.net(self._prepared(images))

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps (N, D', h, w), as in eval mode."""
        return self._split[0].run_maps(self._prepared(images))

    def pool(self, maps: Tensor) -> Tensor:
        """Features (N, D), the head's input, of maps (N, D', h, w)."""
        return self._split[0].run_pool(maps)

    def _prepared(self, images: Tensor) -> Tensor:
        if self._channels == 1:
            return (images - 0.5) / 0.25
        mean, sd = images.new_tensor(_IMAGENET_MEAN), images.new_tensor(_IMAGENET_SD)
        return (images - mean[:, None, None]) / sd[:, None, None]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode and no gradients inside; every module's own mode restored after, also on errors."""
        modes = [(module, module.training) for module in self.net.modules()]
        self.net.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def extract(
        self,
        dataset: RadiographDataset,
        *,
        pixels: Pixels | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 64,
        with_maps: bool = False,
        progress: bool = True,
    ) -> Features:
        """Features of a dataset, in its order, in eval mode, on the CPU.

        Args:
            dataset: N radiographs.
            pixels: the dataset's pixels where they were made before; None makes them.
            indices: some of the images; None takes all.
            batch_size: images a step.
            with_maps: keep the feature maps too (N D' h w numbers).
            progress: show a bar.

        Raises:
            BayescamError: the network yields NaN or infinite features; the first such image is named.
        """
        rows = np.arange(len(dataset)) if indices is None else np.asarray(indices)
        if pixels is None:
            dataset, rows = dataset.select(rows), np.arange(len(rows))
            pixels = dataset.pixels(self.image_size, progress=progress)
        features, maps = [], []
        with self.evaluating():
            for start in tqdm(
                range(0, len(rows), batch_size), desc="features", unit="batch", disable=None if progress else True
            ):
                batch = rows[start : start + batch_size]
                cells = self.maps(pixels.batch(batch).to(self.device))
                phi = self.pool(cells)
                finite = torch.isfinite(phi).all(1)
                if not bool(finite.all()):
                    bad = int(batch[int((~finite).nonzero()[0])])
                    raise BayescamError(
                        f"{dataset.records[bad].obs_id}: the network's features are not finite; check its weights"
                    )
                features.append(phi.cpu())
                if with_maps:
                    maps.append(cells.cpu())
        ids = tuple(dataset.records[int(i)].obs_id for i in rows)
        labels = torch.as_tensor(dataset.labels[rows])
        return Features(torch.cat(features), labels, ids, torch.cat(maps) if with_maps else None)

    def save(self, path: Path, *, classes: Sequence[str]) -> None:
        """Write the network as safetensors with what is needed to build it again."""
        metadata = {
            "kind": "backbone",
            "name": self.name,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "classes": list(classes),
        }
        save_tensors(Path(path), self.net.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path) -> tuple[Backbone, tuple[str, ...]]:
        """The network that ``save`` wrote, in eval mode, and its class names.

        Raises:
            FileFormatError: broken, foreign, of other shapes, or a user's own module (which only its code can build).
        """
        tensors, metadata = load_tensors(Path(path), kind="backbone")
        try:
            name, classes = str(metadata["name"]), tuple(str(c) for c in metadata["classes"])
            num_classes, size = int(metadata["num_classes"]), int(metadata["image_size"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(f"{path}: incomplete metadata ({error})") from error
        if len(classes) != num_classes:
            raise FileFormatError(f"{path}: {len(classes)} class names for {num_classes} classes")
        if name == "module":
            raise FileFormatError(f"{path}: a network of your own; only your code can build it, then load its state")
        try:
            backbone = cls(name, num_classes, image_size=size)
        except ValueError as error:
            raise FileFormatError(f"{path}: {error}") from error
        _load_state(backbone.net, tensors, path)
        return backbone.eval(), classes


def _load_state(net: nn.Module, tensors: dict[str, Tensor], path: Path | str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        names = sorted(set(expected) ^ set(found)) or [n for n in expected if expected[n] != found[n]]
        raise FileFormatError(f"{path}: does not fit this network at {names[0]!r}; name the network it was saved from")
    net.load_state_dict(tensors)


def _build(name: str, num_classes: int, weights: str | None) -> tuple[nn.Module, int]:
    local = weights is not None and Path(weights).suffix == ".safetensors"
    if name in _OWN:
        kind, size = _OWN[name]
        net = kind(num_classes)
        if weights is not None and not local:
            raise ValueError(f"weights={weights!r}: {name!r} has no published weights; give a .safetensors file")
    else:
        net, size = _torchvision(name, None if local else weights), 224
        _new_head(net, num_classes)
    if local:
        assert weights is not None
        _load_local(net, Path(weights))
    return net, size


def _torchvision(name: str, weights: str | None) -> nn.Module:
    from torchvision.models import get_model

    check_name(name)
    if weights is not None and Path(weights).suffix in (".pth", ".pt", ".pkl", ".bin", ".ckpt"):
        raise BayescamError(
            f"{weights}: pickled weights can run code and are not read; convert them once with "
            "safetensors.torch.save_file(torch.load(file, weights_only=True), 'weights.safetensors')"
        )
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    try:
        return get_model(name, weights=weights, **quiet)
    except (ValueError, KeyError) as error:
        raise BayescamError(f"weights {weights!r} of {name}: {error}; try DEFAULT or a .safetensors file") from error
    except OSError as error:
        raise BayescamError(
            f"weights {weights!r} of {name} cannot be downloaded ({error}); give a local .safetensors file instead"
        ) from error


def _new_head(net: nn.Module, num_classes: int) -> None:
    name = last_linear(net)
    parent, _, child = name.rpartition(".")
    old = net.get_submodule(name)
    assert isinstance(old, nn.Linear)
    setattr(net.get_submodule(parent), child, nn.Linear(old.in_features, num_classes))


def _load_local(net: nn.Module, path: Path) -> None:
    """A state of the same network; a head for other classes is left out and keeps its fresh values."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BayescamError(f"{path}: no such weights file; give a .safetensors file or leave --weights out")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path}: not a whole safetensors file ({error})") from error
    own, head = net.state_dict(), last_linear(net)
    for part in (f"{head}.weight", f"{head}.bias"):
        if part in tensors and tensors[part].shape != own[part].shape:
            tensors[part] = own[part]
    broken = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise FileFormatError(f"{path}: tensor {broken[0]!r} holds NaN or infinite numbers")
    _load_state(net, tensors, path)
