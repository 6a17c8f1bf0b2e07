"""The same posterior on 1, 2 and 4 ranks; bad shards end every rank in one voice (gloo, localhost, bounded in time).

One process group is started for each number of ranks, and does all the work: ``main`` runs on every rank, and the
tests read what it left.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bayescam as bc
from bayescam.errors import RankError
from bayescam.parallel import after_first, from_first, rows_on_first, share, shares, together
from bayescam.posterior.evidence import BRACKET

N, D, K = 101, 5, 4
M = 120
SECONDS = 300
STRUCTURES = ("full", "kron", "diag")
BRACKETS = {"full": BRACKET, "kron": (0.1, 10.0), "diag": (0.1, 10.0)}  # the MAPs of each tau are the same in all three
NUTS = {"num_chains": 3, "num_samples": 10, "num_warmup": 15, "progress": False}


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    phi = torch.randn(N, D, dtype=torch.float64, generator=generator)
    logits = phi @ torch.randn(D, K, dtype=torch.float64, generator=generator)
    return phi.to(dtype), (logits + torch.randn(N, K, dtype=torch.float64, generator=generator)).argmax(1)


def correlated():
    """Features of a trained network's kind: correlated, and told nearly apart."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(5, 16, dtype=torch.float64, generator=generator)
    phi = torch.relu(torch.randn(M, 5, dtype=torch.float64, generator=generator) @ mixing)
    logits = phi @ torch.randn(16, K, dtype=torch.float64, generator=generator)
    return phi, (logits + torch.randn(M, K, dtype=torch.float64, generator=generator)).argmax(1)


def results(phi, labels, structure, group=None):
    """Everything a fit says, tau chosen by the evidence and one class counted double."""
    weights = torch.ones(K)
    weights[1] = 2
    options = {"structure": structure, "bracket": BRACKETS[structure], "class_weights": weights}
    fit = bc.fit_laplace(phi, labels, num_classes=K, group=group, **options)
    refined = fit.refine(phi, labels, group=group)
    return {
        "tau": torch.tensor(fit.prior_precision),
        "mean": fit.theta_mean,
        "sd": torch.cat([fit.weight_sd, fit.bias_sd[:, None]], 1),
        "evidence": torch.tensor(fit.log_evidence),
        "count": torch.tensor(float(fit.num_train)),
        "refined mean": refined.theta_mean,
        "refined sd": torch.cat([refined.weight_sd, refined.bias_sd[:, None]], 1),
        "elbo": torch.tensor(refined.elbo),
    }


def drawn(phi, labels, group=None, **options):
    generator = torch.Generator().manual_seed(0)
    whole = (torch.randn(61, 2, dtype=torch.float64, generator=generator), torch.arange(61) % 3)
    laplace = bc.fit_laplace(*whole, prior_precision=1.0)
    own = share(61, group)
    return bc.sample_nuts(laplace, whole[0][own], whole[1][own], group=group, **NUTS, **options)


def complaints(group):
    """What every rank says to shards that cannot be used, in turn."""
    me = torch.distributed.get_rank(group)
    phi, labels = (part[share(N, group)].clone() for part in problem())
    last = torch.distributed.get_world_size(group) - 1
    nan, out, narrow = phi.clone(), labels.clone(), phi
    if me == last:
        nan[2, 1], out[3], narrow = torch.nan, 9, phi[:, :-1]
    cases = {
        "nan": (nan, labels, K),
        "label": (phi, out, K),
        "width": (narrow, labels, K),
        "type": (phi.float() if me == last else phi, labels, K),
        "classes": (phi, labels, K + (me == last)),
        "empty": (phi[:0] if me == last else phi, labels[:0] if me == last else labels, K),
    }
    said = {}

    def hear(name, function, *arguments, **options):
        try:
            function(*arguments, group=group, **options)
        except (ValueError, RankError) as error:
            said[name] = [type(error).__name__, str(error)]

    for name, (features, targets, k) in cases.items():
        hear(name, bc.fit_laplace, features, targets, num_classes=k, prior_precision=1.0)
    differ = {
        "prior_precision": 1.0 + (me == last),
        "structure": "kron" if me == last else "full",
        "class_weights": torch.ones(K) + (me == last),
        "bracket": (1e-3, 10.0 + (me == last)),
    }
    for name, value in differ.items():
        hear(name, bc.fit_laplace, phi, labels, num_classes=K, **{"prior_precision": 1.0, name: value})
    hear("refused", bc.fit_laplace, phi, labels, num_classes=K, prior_precision=-1.0 if me == last else 1.0)
    laplace = bc.fit_laplace(*problem(), num_classes=K, prior_precision=1.0)
    for name, value in {"num_chains": 1 + (me == last), "seed": me // max(last, 1), "num_samples": 2 + me}.items():
        hear(name, bc.sample_nuts, laplace, phi, labels, **{**NUTS, "num_samples": 2, name: value})
    return said


def plumbing(group):
    """``bayescam.parallel`` itself."""
    me = torch.distributed.get_rank(group)
    rows = rows_on_first(torch.arange(10.0).view(5, 2)[share(5, group)], 5, group)
    order = after_first(lambda: me, group)
    heard = from_first({"name": "é", "rows": [1, 2]} if me == 0 else None, group)
    return [None if rows is None else rows.flatten().tolist(), order, heard, together(lambda: me + 1, group)]


def everything(group, rank, folder):
    """Fits, draws and complaints of one rank: arrays and words."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        phi, labels = (part[share(N, group)] for part in problem(dtype))
        for structure in STRUCTURES:
            values = results(phi, labels, structure, group)
            found |= {f"{dtype} {structure} {name}": value.numpy() for name, value in values.items()}
    for deal in (True, False):
        nuts = drawn(*problem(), group, deal_chains=deal, folder=folder / f"deal-{deal}" if rank == 0 else None)
        found[f"weight {deal}"], found[f"lp {deal}"] = nuts.draws.weight.numpy(), nuts.stats["lp"]
        again = drawn(*problem(), group, deal_chains=deal, folder=folder / f"deal-{deal}" if rank == 0 else None)
        found[f"again {deal}"] = again.draws.weight.numpy()
    return found, {"said": complaints(group), "plumbing": plumbing(group)}


def correlated_fits(group, *_):
    """Fits on correlated features, and chains that all ranks walk."""
    found = {}
    for structure in STRUCTURES:
        values = results(*(part[share(M, group)] for part in correlated()), structure, group)
        found |= {f"{structure} {name}": value.numpy() for name, value in values.items()}
    found["walked"] = drawn(*problem(), group, deal_chains=False).draws.weight.numpy()
    return found, {}


def main(rank, world, folder, work):
    """One rank: this file run as a script."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    arrays, words = work(torch.distributed.group.WORLD, rank, folder)
    np.savez(folder / f"rank-{rank}.npz", **arrays)
    (folder / f"rank-{rank}.json").write_text(json.dumps(words))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(folder, world, work, *, last_rank=()):
    """What every rank left: [(arrays, words)]; the last one has further settings in its environment."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder), work],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
            | (dict(last_rank) if rank == world - 1 else {}),
        )
        for rank in range(world)
    ]
    try:
        for process in started:
            said, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in started:
            process.kill()
    files = [folder / f"rank-{rank}" for rank in range(world)]
    return [(np.load(f"{file}.npz"), json.loads(Path(f"{file}.json").read_text())) for file in files]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks"), request.param, "everything")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the settings are of Intel's library")
def test_ranks_on_unlike_processors_have_the_same_posterior(tmp_path):
    """One rank without its vector instructions: every last digit differs, and no decision may."""
    plain = {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
    (first, _), (last, _) = run(tmp_path, 2, "correlated_fits", last_rank=plain)
    for name, value in first.items():
        rounding = 1e-12 if name.endswith("sd") else 0  # taken from the covariance, which is the same, by each itself
        np.testing.assert_allclose(last[name], value, rtol=rounding, atol=0, err_msg=name)
    for structure in STRUCTURES:
        for name, value in results(*correlated(), structure).items():
            same = torch.from_numpy(first[f"{structure} {name}"])
            assert float((same - value).abs().max() / value.abs().max()) < 1e-5, (structure, name)
    np.testing.assert_allclose(first["walked"], drawn(*problem()).draws.weight.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_ranks_agree_with_one_in_float64(ranks, structure):
    for name, value in results(*problem(), structure).items():
        for found, _ in ranks:
            same = torch.from_numpy(found[f"torch.float64 {structure} {name}"])
            assert float((same - value).abs().max() / value.abs().max()) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
def test_ranks_agree_with_one_in_float32_within_a_thousandth_of_an_sd(ranks, structure):
    one = results(*problem(torch.float32), structure)
    for name, value in one.items():
        same = torch.from_numpy(ranks[0][0][f"torch.float32 {structure} {name}"])
        unit = one["refined sd" if "refined" in name else "sd"] if value.ndim else value.abs()
        assert float(((same - value) / unit).abs().max()) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("deal", [True, False])
def test_ranks_draw_what_one_process_draws(ranks, deal):
    one = drawn(*problem())
    first = ranks[0][0]
    for found, _ in ranks:
        np.testing.assert_array_equal(found[f"weight {deal}"], first[f"weight {deal}"])
        np.testing.assert_array_equal(found[f"again {deal}"], first[f"weight {deal}"])
    tolerance = {"rtol": 0, "atol": 0} if deal else {"rtol": 1e-6, "atol": 1e-7}
    np.testing.assert_allclose(first[f"weight {deal}"], one.draws.weight.numpy(), **tolerance)
    np.testing.assert_allclose(first[f"lp {deal}"], one.stats["lp"], rtol=1e-9)


@pytest.mark.slow
def test_what_one_rank_refuses_all_refuse(ranks):
    last = len(ranks) - 1
    for number, (_, words) in enumerate(ranks):
        said = words["said"]
        own = number == last
        kind, prefix = ("ValueError", "") if own else ("RankError", f"rank {last} stopped: ")
        assert said["nan"] == [kind, f"{prefix}features[2, 1] is nan; drop that image or mend the network that made it"]
        assert said["label"] == [kind, f"{prefix}labels[3] is 9, outside 0..3; check num_classes"]
        assert said["empty"][0] == kind
        assert "no image" in said["empty"][1]
        assert said["refused"][0] == kind
        assert said["refused"][1].startswith(f"{prefix}prior_precision is -1")
        differ = {
            "width": "D is 5",
            "type": "float64 is True",
            "classes": "num_classes is 4",
            "prior_precision": "prior_precision is 1.0",
            "structure": "structure is 'full'",
            "class_weights": "class_weights is [1.0, 1.0, 1.0, 1.0]",
            "bracket": "bracket is (0.001, 10.0)",
            "num_chains": "num_chains is 1",
            "seed": "settings is ChainSettings(",
            "num_samples": "settings is ChainSettings(",
        }
        for name, fact in differ.items():
            assert said[name][0] == "ValueError"
            assert f"the ranks disagree: {fact}" in said[name][1], name
            assert "give every rank the same" in said[name][1]


@pytest.mark.slow
def test_rows_go_to_the_first_and_its_word_to_all(ranks):
    for number, (_, words) in enumerate(ranks):
        rows, order, heard, checked = words["plumbing"]
        assert rows == (list(range(10)) if number == 0 else None)
        assert (order, checked) == (number, number + 1)
        assert heard == {"name": "é", "rows": [1, 2]}


def test_without_a_group_everything_is_one_rank():
    assert shares(7, None) == [slice(0, 7)]
    assert from_first("x", None) == "x"
    assert after_first(lambda: 3, None) == 3
    rows = torch.ones(2, 2)
    assert rows_on_first(rows, 2, None) is rows
    with pytest.raises(ValueError, match="as it was"):
        together(lambda: (_ for _ in ()).throw(ValueError("as it was")), None)
    with pytest.raises(ValueError, match="deal_chains is True without a process group"):
        drawn(*problem(), deal_chains=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), globals()[sys.argv[4]])
