"""GPUs and ranks: each rank has its own, or the command is refused in one line."""

from __future__ import annotations

import pytest
import torch

from bayescam.cli import main
from bayescam.doctor import resolve_device
from bayescam.errors import UsageError

from .stand_in_device import stand_in_device


@pytest.mark.parametrize(
    ("device", "ranks", "gpus", "words"),
    [
        (
            "cuda:0",
            2,
            2,
            "--device cuda:0: under torchrun each rank takes the GPU of its own number; say --device cuda",
        ),
        ("cuda", 4, 1, "--device cuda: torchrun started 4 ranks, and GPUs here are 1; say --nproc-per-node 1, or"),
        ("auto", 4, 2, "--device auto: torchrun started 4 ranks, and GPUs here are 2; say --nproc-per-node 2, or"),
        ("cuda:7", 1, 1, "--device cuda:7: not usable here"),
        ("meta", 1, 1, "--device meta: unknown; say auto, cpu, cuda or cuda:0"),
        ("cuda\n", 1, 1, r"--device cuda\n: unknown; say"),
        ("mps", 1, 1, "--device mps: has no float64"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_in_one_line(device, ranks, gpus, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with stand_in_device():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        with pytest.raises(UsageError) as raised:
            resolve_device(device)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("device", "ranks"), [("cuda:0", 1), ("auto", 2), ("cuda", 2), ("cpu", 99)])
def test_a_device_for_each_rank_is_taken(device, ranks, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    with stand_in_device():
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert resolve_device(device) == {"auto": "cuda"}.get(device, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match=r"--device cuda: not usable here .*; say --device cpu"):
        resolve_device("cuda")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_commands_that_ranks_cannot_share_are_refused_by_rank_0(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["doctor"]) == 2
    said = "bayescam: rank 0: doctor is for one process, and torchrun started several; it shares out `run` alone\n"
    assert capsys.readouterr() == ("", said if rank == "0" else "")
