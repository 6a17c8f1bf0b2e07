"""The configuration: default < file < flag, unknown keys and wrong types named, a round trip that changes nothing."""

from __future__ import annotations

import pytest

from bayescam.config import Config, read_config, to_toml
from bayescam.errors import UsageError


def test_default_below_file_below_flag(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("seed = 3\n[train]\nepochs = 5\n")
    config = read_config(file, {"train.epochs": 7, "data.limit": None})
    assert (config.seed, config.train.epochs, config.train.batch_size) == (3, 7, Config().train.batch_size)


def test_preset_gives_the_defaults_below_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[nuts]\nnum_samples = 17\n")
    config = read_config(file, {"preset": "quick"})
    assert config.nuts.num_samples == 17
    assert config.nuts.num_warmup == read_config(None, {"preset": "quick"}).nuts.num_warmup


@pytest.mark.parametrize("preset", ["quick", "standard", "thorough"])
def test_written_and_read_again_is_the_same(tmp_path, preset):
    config = read_config(None, {"preset": preset, "data.limit": 5, "posterior.prior_precision": 2.0})
    file = tmp_path / "c.toml"
    file.write_text(to_toml(config))
    assert read_config(file, {}) == config


def test_relative_paths_in_a_file_start_at_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[data]\nspec = "images"\n')
    assert read_config(file, {}).data.spec == str(tmp_path / "images")
    file.write_text('[data]\nspec = "phantom"\n')
    assert read_config(file, {}).data.spec == "phantom"


def test_relative_paths_in_flags_start_at_the_working_directory_wherever_the_run_folder_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(None, {"data.spec": "images", "backbone.weights": "w.safetensors", "data.root": "r"})
    stored = tmp_path / "runs/one/config.toml"
    stored.parent.mkdir(parents=True)
    stored.write_text(to_toml(config))
    assert read_config(stored, {}) == config
    assert config.data.spec == str(tmp_path / "images")
    assert read_config(None, {"backbone.weights": "DEFAULT"}).backbone.weights == "DEFAULT"


def test_a_path_that_toml_cannot_hold_is_refused_in_words():
    with pytest.raises(UsageError, match=r"data\.spec .*not UTF-8.*rename"):
        read_config(None, {"data.spec": "caf\udce9"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sed = 1", "unknown setting sed; did you mean seed?"),
        ("[data]\nlimt = 3", "did you mean data.limit?"),
        ('[data]\nlimit = "x"', "data.limit must be a whole number, got 'x'"),
        ("[train]\nepochs = true", "train.epochs must be a whole number, got True"),
        ("seed = -1", "seed must be at least 0"),
        ("seed = 2147483648", "below 2147483648"),
        ("[data]\nphantom_images = 100000000000", "data.phantom_images must be at most 10000000, got 100000000000"),
        ("[nuts]\nnum_samples = 1000000000", "nuts.num_samples must be at most 10000000"),
        ("data = 3", "data must be a table"),
        ('preset = "fast"', "preset 'fast' is unknown"),
        ("[data]\nvalid = 0.6\ntest = 0.5", "must leave images to train on"),
        ("[posterior]\nprior_precision = 0", "prior_precision must be a positive number"),
        ('[data]\non_bad = "ignore"', "must be one of raise, skip"),
        ("[train]\nlearning_rate = nan", "learning_rate must be positive and finite"),
        ("preset = []", "preset [] is unknown"),
        ("[train]\nlearning_rate = 1" + "0" * 400, "learning_rate must be positive and finite, got inf"),
        ("x = " + "[" * 20_000, "not a readable TOML file"),
        ("seed = 1\nseed = 2", "not a readable TOML file"),
        ("no toml", "not a readable TOML file"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_setting(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_config(file, {})
    assert words in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        read_config(tmp_path / "absent.toml", {})
