"""NUTS over shards of the images: every rank draws what one process draws from all of them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import bayescam as bc

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(5)
features = torch.randn(61, 2, dtype=torch.float64)
labels = torch.arange(61) % 3
laplace = bc.fit_laplace(features, labels, prior_precision=1.0)
options = dict(num_chains=2, num_samples=10, num_warmup=15, progress=False)
part = slice(None, 20) if rank == 0 else slice(20, None)
shards = bc.sample_nuts(laplace, features[part], labels[part], group=dist.group.WORLD, **options)
whole = bc.sample_nuts(laplace, features, labels, **options)
assert torch.allclose(shards.draws.weight, whole.draws.weight, rtol=1e-6, atol=1e-7)
assert abs(shards.stats["lp"] - whole.stats["lp"]).max() < 1e-6
gathered = [torch.empty_like(shards.draws.weight) for _ in range(2)]
dist.all_gather(gathered, shards.draws.weight)
assert torch.equal(gathered[0], gathered[1])
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.slow
def test_two_ranks_draw_what_one_process_draws(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said, error = rank.communicate(timeout=300)
        assert said.strip() == "the same", error
