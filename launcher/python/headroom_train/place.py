"""This process's place among the ranks of a job, whoever started it: launch, torchrun, srun, mpirun, Lightning, or nobody."""

import hashlib
import os
import re
import sys
from typing import NamedTuple


class Place(NamedTuple):
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


class PlaceError(ValueError):
    """Variables of a launcher that contradict each other."""


# Names of rank, world, local rank and ranks of this node. SLURM_PROCID is set in a batch script too, which is no rank:
# SLURM_STEP_NUM_TASKS tells a step.
_LAUNCHERS = [
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
]


def _number(env, name):
    text = env[name]
    try:
        value = int(text.strip())
    except ValueError:
        value = -1
    if value < 0:
        raise PlaceError(f"{name}={text!r}: expected a whole number, as launchers set it; unset it to run alone")
    return value


def _slurm_tasks(text, node):
    left = node
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\(x(\d+)\))?\s*", part)
        if not match:
            raise PlaceError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: expected such as 4(x2),3")
        times = int(match.group(2) or 1)
        if left < times:
            return int(match.group(1))
        left -= times
    raise PlaceError(f"SLURM_STEP_TASKS_PER_NODE={text!r} has no node {node}")


def of_environment(env=os.environ):
    """The place that a launcher gave in the environment; alone without one."""
    for rank, world, local_rank, local_world in _LAUNCHERS:
        if rank not in env or (rank != "RANK" and world not in env):
            continue
        if world not in env:
            raise PlaceError(f"{rank} is set and {world} is not: launchers set both; unset {rank} to run alone")
        here, of = _number(env, rank), _number(env, world)
        local = _number(env, local_rank) if local_rank in env else None
        if local_world not in env:
            local_of = of if local in (None, here) else (local or 0) + 1
        elif local_world.startswith("SLURM"):
            node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
            local_of = _slurm_tasks(env[local_world], node)
        else:
            local_of = _number(env, local_world)
        local = here if local is None else local
        if not here < of or not local < local_of or local_of > of:
            raise PlaceError(
                f"{rank}={here} of {world}={of}, {local_rank}={local} of {local_of} on this node: ranks count from 0"
            )
        return Place(here, of, local, local_of)
    if "LOCAL_RANK" in env and "WORLD_SIZE" in env:
        # Lightning's own children.
        local, of = _number(env, "LOCAL_RANK"), _number(env, "WORLD_SIZE")
        node = _number(env, "NODE_RANK") if "NODE_RANK" in env else 0
        nodes = _number(env, "NNODES") if "NNODES" in env else 1
        local_of = max(1, of // max(1, nodes))
        return Place(node * local_of + local, of, local, local_of)
    return Place(0, 1, 0, 1)


def place():
    """The place now: torch.distributed's where it is initialised, else the environment's."""
    here = of_environment()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        rank, world = distributed.get_rank(), distributed.get_world_size()
        if (rank, world) != (here.rank, here.world_size):
            # Started by hand, such as with init_process_group("...", rank=, world_size=).
            local = here.local_rank if here.world_size > 1 else rank
            return Place(rank, world, local, max(here.local_world_size, local + 1))
    return here


def job_name(env=os.environ):
    """A name that the ranks of this job on this node have in common, and no other job."""
    user = os.getuid()
    if env.get("HEADROOM_CACHE_DOOR"):
        return env["HEADROOM_CACHE_DOOR"]
    known = [env.get(name, "") for name in (
        "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "HEADROOM_RUN_ID", "HEADROOM_RESTARTS", "MASTER_ADDR",
        "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID", "OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE",
    )]
    try:
        alone = of_environment(env).world_size == 1
    except PlaceError:
        alone = True
    if alone:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as stat:
            began = stat.read().rsplit(")", 1)[1].split()[19]
        known = ["alone", str(os.getpid()), began]
    elif not any(known):
        known = ["parent", str(os.getppid())]
    digest = hashlib.blake2b("\0".join(known).encode(), digest_size=8).hexdigest()
    return f"headroom-{user}-{digest}"
