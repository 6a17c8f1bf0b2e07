"""The ranks that ``torchrun`` starts, as one ``torch.distributed`` process group; without it one rank and no group.

Everything here takes the group or None and does for None what one process would do, so that callers have one path.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bayescam.errors import BayescamError, RankError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = "BAYESCAM_PATIENCE"
_MINUTES = 24 * 60.0
_WORDS = 1024
_FACTS = 2048
_LOST = re.compile(r"\b(gloo|nccl|connection|store|timed out|timeout)", re.IGNORECASE)
_REAPED = 1.0  # seconds in which the parent of a dead process has noticed
_T = TypeVar("_T")


@contextmanager
def joined() -> Iterator[ProcessGroup | None]:
    """The group of all ranks under ``torchrun``: gloo for tensors on the CPU, NCCL for those on GPUs; else None.

    Where there is a GPU for each rank of this machine, the rank takes the one of its own number as ``cuda``.
    A rank waits for the others at most ``BAYESCAM_PATIENCE`` minutes (a day: one may decode all images or walk a chain
    while the others wait; that a rank has died is noticed at once). Of all ranks only the first that fails keeps its
    words: on the others the error is a ``RankError`` that was ``told``.

    Raises:
        UsageError: the environment is not as ``torchrun`` makes it.
        RankError: another rank died, failed or kept this one waiting too long.
    """
    if _count("WORLD_SIZE") == 1:
        yield None
        return
    cuda = 1 <= _count("LOCAL_WORLD_SIZE") <= torch.cuda.device_count()
    if cuda:
        torch.cuda.set_device(_count("LOCAL_RANK", default=0))
    store = _begin("cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=_patience()))
    _when_terminated(_end)
    try:
        yield dist.group.WORLD
    except Exception as error:
        _when_terminated(signal.SIG_IGN)
        raise _of_this_rank(error, store) from error
    _when_terminated(signal.SIG_DFL)
    dist.destroy_process_group()


class _Ended(Exception):
    """``torchrun`` has ended this rank."""


def _end(*_: object) -> None:
    """What SIGTERM does: with it ``torchrun`` ends all ranks when one has died; this one has something to say."""
    _when_terminated(signal.SIG_IGN)
    raise _Ended("torchrun ended this rank")


def _when_terminated(handler: Callable[..., None] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _patience() -> float:
    given = os.environ.get(PATIENCE, str(_MINUTES))
    try:
        minutes = float(given)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e5:
        raise UsageError(f"{PATIENCE}={given!r}: must be a positive number of minutes")
    return minutes


def check_gpus(device: str) -> None:
    """Refuse GPUs that ranks of ``torchrun`` would have to share; without it any.

    Raises:
        UsageError: ``device`` is one GPU by number, or there are more ranks than GPUs on this machine.
    """
    if _count("WORLD_SIZE") == 1:
        return
    if ":" in device:
        raise UsageError(
            f"--device {device}: under torchrun each rank takes the GPU of its own number; say --device cuda"
        )
    ranks, gpus = _count("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if ranks > gpus:
        raise UsageError(
            f"--device {device}: torchrun started {ranks} ranks, and GPUs here are {gpus}; say "
            f"--nproc-per-node {gpus}, or --device cpu"
        )


def _count(name: str, *, default: int = 1) -> int:
    """What ``torchrun`` says in the environment."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise UsageError(f"{name}={given!r}: must be a whole number; start the ranks with torchrun")
    return int(given)


def _begin(backend: str, timeout: timedelta) -> dist.Store:
    # On its first import this module takes the group of that moment for the default of its functions, and keeps it.
    # DistributedDataParallel imports it; were that the first time, destroy_process_group could not end the group's
    # threads, and one that still has a tensor to drop as the interpreter ends takes the process down (SIGABRT).
    import_module("torch.distributed.nn.functional")
    try:
        store, own, count = next(dist.rendezvous("env://", timeout=timeout))
        meeting = dist.PrefixStore("group", store)
        dist.init_process_group(backend, store=meeting, rank=own, world_size=count, timeout=timeout)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the ranks cannot meet ({_line(error)}); start them with torchrun") from error
    shared = dist.PrefixStore("bayescam", store)
    shared.set(f"process {own}", json.dumps([socket.gethostname(), os.getpid()]))
    return shared


def _of_this_rank(error: Exception, store: dist.Store) -> Exception:
    """The error as this rank should raise it: its own, or that others are lost, or what another rank has told."""
    try:
        first = store.add("failed", 1) == 1
    except RuntimeError:  # the store died with its host
        first = True
    if not first:
        return RankError(f"stopped after another rank: {_line(error)}", told=True)
    broken = isinstance(error, RuntimeError) and not isinstance(error, BayescamError) and _LOST.search(str(error))
    if not (broken or isinstance(error, _Ended)):
        return error
    dead = _dead(store)
    said = re.sub(r"^\[\S+\] ", "", _line(error)).split(". ")[0][:200]
    if dead is not None:
        return RankError(
            f"lost rank {dead}, whose process has died ({said}); look for its last words and at the memory, then start "
            "again with --resume"
        )
    if not broken:
        return RankError(f"{said}, as it was told to or because a rank died elsewhere; start again with --resume")
    return RankError(
        f"lost another rank ({said}): it died elsewhere, or was busy for longer than {PATIENCE}={_patience():g} "
        "minutes (raise it); look for its last words, then start again with --resume"
    )


def _dead(store: dist.Store) -> int | None:
    """The first rank on this machine whose process is gone, or is by the time its parent has noticed."""
    keys = [f"process {other}" for other in range(size(dist.group.WORLD))]
    try:
        processes: list[Any] = [json.loads(store.get(key)) if store.check([key]) else ["", 0] for key in keys]
    except RuntimeError:
        return None
    until = time.monotonic() + _REAPED
    while os.name == "posix" and time.monotonic() < until:
        for other, (host, process) in enumerate(processes):
            if host == socket.gethostname() and not _lives(process):
                return other
        time.sleep(0.02)
    return None


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def rank(group: ProcessGroup | None) -> int:
    """This process's number in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def size(group: ProcessGroup | None) -> int:
    """R, the number of ranks; 1 without a group."""
    return 1 if group is None else dist.get_world_size(group)


def memory(device: torch.device) -> float:
    """Bytes of memory for a rank on this device: the GPU's, or its even share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _count("LOCAL_WORLD_SIZE")


def shares(count: int, group: ProcessGroup | None) -> list[slice]:
    """``count`` rows dealt to the ranks as contiguous slices that differ by at most one in length."""
    ranks = size(group)
    bounds = [count * r // ranks for r in range(ranks + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def share(count: int, group: ProcessGroup | None) -> slice:
    """This rank's slice of ``count`` rows."""
    return shares(count, group)[rank(group)]


def from_first(value: Any, group: ProcessGroup | None, device: torch.device | None = None) -> Any:
    """Rank 0's ``value`` on every rank; it must be of JSON. The group must have a backend for ``device``."""
    if group is None:
        return value
    words = json.dumps(value).encode() if rank(group) == 0 else b""
    length = torch.tensor([len(words)], device=device)
    dist.broadcast(length, group_src=0, group=group)
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if words:
        text[:] = torch.tensor(list(words), dtype=torch.uint8)
    dist.broadcast(text, group_src=0, group=group)
    return json.loads(bytes(text.tolist()))


def after_first(make: Callable[[], _T], group: ProcessGroup | None) -> _T:
    """``make()`` on rank 0 and then on the others, who find in the cache what it downloaded or decoded."""
    if rank(group) > 0:
        dist.barrier(group)
        return make()
    value = make()
    if group is not None:
        dist.barrier(group)
    return value


def rows_on_first(rows: Tensor, count: int, group: ProcessGroup | None) -> Tensor | None:
    """On rank 0 all ``count`` rows from the ranks' ``shares``, each sent once; None on the others."""
    if group is None:
        return rows
    if rank(group) > 0:
        dist.send(rows.contiguous(), group_dst=0, group=group)
        return None
    whole = rows.new_empty(count, *rows.shape[1:])
    for source, span in enumerate(shares(count, group)):
        if source == 0:
            whole[span] = rows
        else:
            dist.recv(whole[span], group_src=source, group=group)
    return whole


def check_alike(facts: Mapping[str, object], group: ProcessGroup | None, device: torch.device | None = None) -> None:
    """Refuse facts that differ between the ranks, on every rank in the same words; a fact is told by its ``repr``.

    Raises:
        ValueError: the first fact that differs, with both values.
    """
    if group is None:
        return
    words = json.dumps({name: repr(value)[: _WORDS // 8] for name, value in facts.items()}).encode()
    if len(words) > _FACTS:
        raise ValueError(f"{len(words)} bytes of facts are more than the {_FACTS} of one message")
    own = torch.zeros(_FACTS, dtype=torch.uint8, device=device)
    own[: len(words)] = torch.tensor(list(words), dtype=torch.uint8)
    heard = [torch.empty_like(own) for _ in range(size(group))]
    dist.all_gather(heard, own, group=group)
    told = [json.loads(bytes(message.tolist()).rstrip(b"\0")) for message in heard]
    for source, other in enumerate(told):
        for name in {**told[0], **other}:
            here, there = (found.get(name, "not given") for found in (told[0], other))
            if here != there:
                raise ValueError(
                    f"the ranks disagree: {name} is {here} on rank 0 and {there} on rank {source}; "
                    "give every rank the same"
                )


def together(check: Callable[[], _T], group: ProcessGroup | None, device: torch.device | None = None) -> _T:
    """``check()`` on every rank; where it fails on one, it fails on all, and none is left waiting.

    Raises:
        what ``check`` raised, on the rank it failed on; RankError with its words on the others.
    """
    if group is None:
        return check()
    failure: Exception | None = None
    try:
        value = check()
    except Exception as error:
        failure = error
    words = (b"" if failure is None else _line(failure).encode())[:_WORDS]
    own = torch.zeros(_WORDS, dtype=torch.uint8, device=device)
    own[: len(words)] = torch.tensor(list(words), dtype=torch.uint8)
    heard = [torch.empty_like(own) for _ in range(size(group))]
    dist.all_gather(heard, own, group=group)
    if failure is not None:
        raise failure
    for source, message in enumerate(heard):
        said = bytes(message.tolist()).rstrip(b"\0").decode(errors="replace")
        if said:
            raise RankError(f"rank {source} stopped: {said}")
    return value
