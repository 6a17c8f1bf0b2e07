"""Any classifier reads maps -> pool -> head, and that is the classifier itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bayescam as bc
from bayescam.errors import BayescamError, FileFormatError
from bayescam.storage import save_tensors

FAST = ["small", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
SLOW = [
    "study",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "vgg11",
    "alexnet",
    "convnext_tiny",
    "regnet_y_400mf",
]
AVERAGED = {
    "small",
    "resnet18",
    "shufflenet_v2_x0_5",
    "densenet121",
    "efficientnet_b0",
    "mobilenet_v2",
    "regnet_y_400mf",
}


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_head_of_pool_of_maps_is_the_network(name):
    backbone = bc.Backbone(name, 5).eval()
    images = torch.rand(2, 1, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        maps = backbone.maps(images)
        features = backbone.pool(maps)
        torch.testing.assert_close(backbone.head(features), backbone(images))
        assert features.shape == (2, backbone.num_features)
        assert backbone.is_average == (name in AVERAGED)
        if backbone.is_average:
            torch.testing.assert_close(features, maps.mean((2, 3)))


class Residual(nn.Module):
    """A user's network with functional pooling, three channels and a head that is not called fc."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU())
        self.classify = nn.Linear(6, 4)

    def forward(self, x):
        return self.classify(self.body(x).mean(dim=[2, 3]))


class GoesAround(Residual):
    def forward(self, x):
        cells = self.body(x)
        return self.classify(cells.mean(dim=[2, 3]) + x.mean(dim=[2, 3]).repeat(1, 2))


@pytest.mark.parametrize("maps", [None, "body"])
def test_a_users_module(maps):
    backbone = bc.Backbone.from_module(Residual(), maps=maps, head="classify", image_size=48).eval()
    images = torch.rand(3, 1, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(backbone.head(backbone.pool(backbone.maps(images))), backbone(images))
    assert backbone.is_average
    assert backbone.num_classes == 4


def test_a_network_whose_head_sees_more_than_the_maps_is_refused():
    with pytest.raises(ValueError, match="skip connection"):
        bc.Backbone.from_module(GoesAround(), maps="body", head="classify")


def test_wrong_names_are_named():
    with pytest.raises(ValueError, match="'resnet19' is unknown"):
        bc.Backbone("resnet19", 3)
    with pytest.raises(ValueError, match="num_classes"):
        bc.Backbone("small", 1)
    with pytest.raises(ValueError, match="maps='nowhere' is not in the network"):
        bc.Backbone.from_module(Residual(), maps="nowhere", head="classify")
    with pytest.raises(ValueError, match=r"does not end in an nn\.Linear"):
        bc.Backbone("squeezenet1_0", 3)
    with pytest.raises(ValueError, match=r"not an nn\.Linear"):
        bc.Backbone.from_module(Residual(), head="body")


def test_parts_follow_the_network_after_training_steps():
    backbone = bc.Backbone("small", 3).train()
    optimizer = torch.optim.SGD(backbone.net.parameters(), lr=0.1)
    images = torch.rand(8, 1, 64, 64)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(backbone(images), torch.arange(8) % 3).backward()
        optimizer.step()
    backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone.head(backbone.pool(backbone.maps(images))), backbone(images))


def test_evaluating_restores_every_modules_mode_also_on_errors():
    backbone = bc.Backbone("small", 3).train()
    backbone.net.features[1].eval()
    before = [m.training for m in backbone.net.modules()]
    seen = []

    def stop():
        with backbone.evaluating():
            seen.append(any(m.training for m in backbone.net.modules()) or torch.is_grad_enabled())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert seen == [False]
    assert [m.training for m in backbone.net.modules()] == before
    assert torch.is_grad_enabled()


def test_save_and_load_give_the_same_network(tmp_path):
    backbone = bc.Backbone("small", 3, image_size=64).eval()
    backbone.save(tmp_path / "b.safetensors", classes=["a", "b", "c"])
    again, classes = bc.Backbone.load(tmp_path / "b.safetensors")
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), backbone(images))
    assert classes == ("a", "b", "c")
    assert again.image_size == 64


def _saved(path, **changes):
    backbone = bc.Backbone("small", 3)
    backbone.save(path, classes=["a", "b", "c"])
    tensors = dict(backbone.net.state_dict())
    metadata = {"kind": "backbone", "name": "small", "num_classes": 3, "image_size": 128, "classes": ["a", "b", "c"]}
    for key, value in changes.items():
        (tensors if "." in key else metadata)[key] = value
    save_tensors(path, tensors, metadata)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b"\x80\x04\x95" + b"pickle" * 10), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 8 + b"{}"), "not a whole safetensors file"),
        (lambda p: save_tensors(p, {"x": torch.zeros(1)}, {"kind": "laplace"}), "holds a 'laplace'"),
        (lambda p: _saved(p, **{"head.bias": torch.zeros(4)}), "does not fit"),
        (lambda p: _saved(p, **{"head.bias": torch.full((3,), torch.nan)}), "NaN"),
        (lambda p: _saved(p, name="../../etc"), "unknown"),
        (lambda p: _saved(p, classes=["a"]), "1 class names for 3 classes"),
        (lambda p: _saved(p, image_size="big"), "incomplete metadata"),
    ],
)
def test_broken_and_foreign_files_are_refused_by_name(tmp_path, spoil, words):
    path = tmp_path / "b.safetensors"
    _saved(path)
    spoil(path)
    with pytest.raises(FileFormatError) as caught:
        bc.Backbone.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(BayescamError, match="pickled weights can run code"):
        bc.Backbone("resnet18", 3, weights=str(tmp_path / "w.pth"))


def test_local_weights_with_another_head_keep_the_body(tmp_path):
    from safetensors.torch import save_file

    donor = bc.Backbone("small", 9)
    path = tmp_path / "w.safetensors"
    save_file(donor.net.state_dict(), path)
    backbone = bc.Backbone("small", 3, weights=str(path))
    assert torch.equal(backbone.net.features[0].weight, donor.net.features[0].weight)
    with pytest.raises(BayescamError, match="no such weights file"):
        bc.Backbone("small", 3, weights=str(tmp_path / "absent.safetensors"))
