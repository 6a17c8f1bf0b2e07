"""The same posterior on 1, 2 and 4 ranks (gloo, localhost, bounded in time)."""

from __future__ import annotations

import datetime
import subprocess
import sys

import numpy as np
import pytest
import torch

import bayescam as bc

N, D, K, TAU = 101, 4, 3, 0.5
SECONDS = 60


def problem():
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return phi, (phi @ torch.randn(D, K, dtype=torch.float64, generator=generator)).argmax(1)


def results(phi, labels, structure, group=None):
    fit = bc.fit_laplace(phi, labels, num_classes=K, prior_precision=TAU, structure=structure, group=group)
    refined = fit.refine(phi, labels, group=group)
    return {
        "mean": fit.weight_mean,
        "sd": fit.weight_sd,
        "evidence": torch.tensor(fit.log_evidence),
        "count": torch.tensor(fit.num_train),
        "refined mean": refined.weight_mean,
        "refined sd": refined.weight_sd,
        "elbo": torch.tensor(refined.elbo),
    }


def main(rank, world, store, structure, out):
    """One rank: this file run as a script."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=SECONDS)
    )
    phi, labels = problem()
    bounds = torch.linspace(0, N, world + 1).long().tolist()
    own = slice(bounds[rank], bounds[rank + 1])
    found = results(phi[own], labels[own], structure, torch.distributed.group.WORLD)
    if rank == 0:
        np.savez(out, **{name: value.numpy() for name, value in found.items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_ranks_agree_with_one(tmp_path, structure, world):
    out = tmp_path / "found.npz"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(tmp_path / "store"), structure, str(out)]
        )
        for rank in range(world)
    ]
    try:
        assert [process.wait(timeout=SECONDS) for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    found = np.load(out)
    for name, value in results(*problem(), structure).items():
        loose = {"rtol": 1e-3, "atol": 1e-4} if "refined" in name else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(torch.from_numpy(found[name]), value, msg=name, **loose)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
