"""The settings of a run: frozen dataclasses, TOML in and out; default (by preset) < file < flag."""

from __future__ import annotations

import difflib
import math
import operator
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bayescam.errors import UsageError

Preset = Literal["quick", "standard", "thorough"]


@dataclass(frozen=True)
class DataConfig:
    """Which radiographs, and how they are split.

    Args:
        spec: "phantom", "mednist", "mura", a folder of class folders, or a manifest.csv.
        root: where mednist or mura lies.
        phantom_images: how many radiographs the phantom draws.
        limit: at most so many images, drawn by seed with whole patients; absent: all.
        on_bad: "raise" stops at unreadable images, "skip" leaves them out before the split and counts them.
        num_workers: how many images are read side by side; 0 takes one a core.
        image_size: side of the square in pixels; absent: the network's own.
        valid, test: shares of the patients (an official split of the data wins).
        show_patients: write patient ids into the run's files as they are, not as pseudonyms.
    """

    spec: str = "phantom"
    root: str | None = None
    phantom_images: int = 3000
    limit: int | None = None
    on_bad: Literal["raise", "skip"] = "raise"
    num_workers: int = 0
    image_size: int | None = None
    valid: float = 0.15
    test: float = 0.2
    show_patients: bool = False


@dataclass(frozen=True)
class BackboneConfig:
    """The network: a name that ``bayescam.Backbone`` knows, and weights to start from."""

    name: str = "small"
    weights: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained; see ``bayescam.backbone.training.TrainingSettings``."""

    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    augment: bool = True


@dataclass(frozen=True)
class PosteriorConfig:
    """The Bayesian last layer.

    Args:
        prior_precision: tau, or "evidence" to maximise the Laplace evidence on the training split.
        num_samples: draws of a Laplace posterior where draws are needed.
    """

    prior_precision: float | str = "evidence"
    num_samples: int = 500


@dataclass(frozen=True)
class NutsConfig:
    """The referee; sizes per chain."""

    num_chains: int = 4
    num_samples: int = 500
    num_warmup: int = 200
    kernel: Literal["nuts", "hmc"] = "nuts"


@dataclass(frozen=True)
class ExplainConfig:
    """Class activation maps: how many test images get one in ``cams.nc``."""

    num_images: int = 24


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers; ``config.toml`` is this, written out.

    Args:
        seed: of everything random.
        seeds: how many more times the network is trained, from other seeds, to see what that moves; the last layer's
            posterior cannot know it.
    """

    preset: Preset = "standard"
    seed: int = 0
    seeds: int = 0
    device: str = "auto"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    posterior: PosteriorConfig = field(default_factory=PosteriorConfig)
    nuts: NutsConfig = field(default_factory=NutsConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)


_PRESETS: dict[str, Config] = {
    "quick": Config(
        preset="quick",
        data=DataConfig(phantom_images=1000),
        train=TrainConfig(epochs=6),
        nuts=NutsConfig(num_chains=4, num_samples=200, num_warmup=100),
        explain=ExplainConfig(num_images=12),
    ),
    "standard": Config(preset="standard"),
    "thorough": Config(
        preset="thorough",
        data=DataConfig(phantom_images=8000),
        train=TrainConfig(epochs=30),
        posterior=PosteriorConfig(num_samples=2000),
        nuts=NutsConfig(num_chains=4, num_samples=1000, num_warmup=300),
        explain=ExplainConfig(num_images=48),
    ),
}


def read_config(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a run: the preset's defaults, then the file, then the flags.

    Args:
        path: a TOML file, or None. Relative paths in it are taken from its own folder.
        overrides: dotted names to values, from flags; None values are flags not given. Relative paths among them are
            taken from the working directory, so that the resolved configuration means the same anywhere.

    Raises:
        UsageError: absent or broken file, unknown key, wrong type, value out of range; the message names it.
    """
    table = _load(path) if path is not None else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    preset = given.get("preset", table.get("preset", "standard"))
    if not isinstance(preset, str) or preset not in _PRESETS:
        raise UsageError(f"preset {preset!r} is unknown; take one of {', '.join(_PRESETS)}")
    config = _merge(_PRESETS[preset], table, where=str(path), prefix="")
    for name, value in given.items():
        config = _merge(config, _nest(name, _from_folder(name, value, Path.cwd())), where="flags", prefix="")
    config = replace(config, preset=preset)
    _check_ranges(config)
    return config


def to_toml(config: Config) -> str:
    """The configuration as TOML; ``read_config`` of it gives the same configuration."""
    import tomli_w

    return tomli_w.dumps(_without_none(asdict(config)))


def _load(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file; give a TOML file such as a run's config.toml") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: not a readable TOML file ({error})") from error
    for name in _PATHS:
        head, _, key = name.partition(".")
        section = table.get(head)
        if isinstance(section, dict) and key in section:
            section[key] = _from_folder(name, section[key], path.parent)
    return table


_PATHS = ("data.spec", "data.root", "backbone.weights")


def _from_folder(name: str, value: Any, folder: Path) -> Any:
    """A setting that is a relative path, made absolute; every other value as it is."""
    if name not in _PATHS or not isinstance(value, str):
        return value
    if name == "data.spec" and value in ("phantom", "mednist", "mura"):
        return value
    if name == "backbone.weights" and not value.endswith(".safetensors"):
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} {value!r}: not UTF-8, which config.toml must be; rename it or make a link to it"
        ) from error
    return os.path.abspath(folder / value)


def _merge(config: Any, table: Mapping[str, Any], *, where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    known = [f.name for f in fields(config)]
    changes: dict[str, Any] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {prefix}{close[0]!s}?" if close else f"; known here: {', '.join(known)}"
            raise UsageError(f"{where}: unknown setting {name}{hint}")
        current = getattr(config, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {name} must be a table, got {value!r}")
            changes[key] = _merge(current, value, where=where, prefix=f"{name}.")
        else:
            changes[key] = _typed(value, hints[key], where=where, name=name)
    return replace(config, **changes)


def _typed(value: Any, hint: Any, *, where: str, name: str) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and isinstance(value, str):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return _as_float(value)
        elif isinstance(option, type) and isinstance(value, option) and isinstance(value, bool) == (option is bool):
            return value
    raise UsageError(f"{where}: {name} must be {_in_words(options)}, got {value!r}")


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _in_words(options: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    words = []
    for option in options:
        if typing.get_origin(option) is Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif option in names:
            words.append(names[option])
    return " or ".join(words)


def _nest(name: str, value: Any) -> dict[str, Any]:
    head, _, rest = name.partition(".")
    return {head: _nest(rest, value) if rest else value}


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


_AT_LEAST: dict[str, float] = {
    "seed": 0,
    "seeds": 0,
    "data.phantom_images": 1,
    "data.limit": 1,
    "data.num_workers": 0,
    "data.image_size": 32,
    "train.epochs": 1,
    "train.batch_size": 2,
    "train.weight_decay": 0,
    "posterior.num_samples": 2,
    "nuts.num_chains": 2,
    "nuts.num_samples": 4,
    "nuts.num_warmup": 20,
    "explain.num_images": 1,
}

_AT_MOST: dict[str, float] = {  # beyond what anybody has: a slip of the hand, which would run for years
    "seeds": 1000,
    "data.phantom_images": 10_000_000,
    "data.num_workers": 1024,
    "data.image_size": 4096,
    "train.epochs": 100_000,
    "train.batch_size": 1_000_000,
    "posterior.num_samples": 1_000_000,
    "nuts.num_chains": 10_000,
    "nuts.num_samples": 10_000_000,
    "nuts.num_warmup": 10_000_000,
    "explain.num_images": 10_000,
}


def _check_ranges(config: Config) -> None:
    table = asdict(config)

    def value_of(name: str) -> Any:
        head, _, rest = name.partition(".")
        return table[head][rest] if rest else table[head]

    def require(name: str, holds: Callable[[Any], bool], words: str) -> None:
        value = value_of(name)
        if value is not None and not holds(value):
            raise UsageError(f"{name} must be {words}, got {value!r}")

    for name, low in _AT_LEAST.items():
        require(name, partial(operator.le, low), f"at least {low:g}")
    for name, high in _AT_MOST.items():
        require(name, partial(operator.ge, high), f"at most {high:.0f}")
    require("seed", lambda value: value < 2**31, "below 2147483648")
    require("train.learning_rate", lambda value: 0 < value < math.inf, "positive and finite")
    for name in ("data.valid", "data.test"):
        require(name, lambda value: 0 < value < 1, "between 0 and 1")
    if config.data.valid + config.data.test >= 1:
        raise UsageError("data.valid + data.test must leave images to train on (sum below 1)")
    require(
        "posterior.prior_precision",
        lambda value: value == "evidence" or (isinstance(value, float) and 0 < value < math.inf),
        'a positive number or "evidence"',
    )
    require("device", lambda value: value in ("auto", "cpu", "mps") or value.startswith("cuda"), "auto, cpu or cuda")
