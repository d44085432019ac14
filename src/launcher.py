"""What the launcher (torchrun, srun or Lightning) puts into a process's environment."""

import os
import uuid


def is_first_process() -> bool:
    """Whether the launcher made this process rank 0, by torchrun's variable, or srun's and Lightning's own."""
    names = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
    return not any(int(os.environ.get(name, 0)) for name in names)


def processes() -> tuple[int, int, str]:
    """Rank, number of processes and the run's name, from `torchrun` or `srun`; one process otherwise."""
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        run = [environment.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
        return int(environment["RANK"]), int(environment["WORLD_SIZE"]), "torchrun " + " ".join(run)
    # In a batch script without srun SLURM_NTASKS is there too, but no other process is.
    if "SLURM_STEP_NUM_TASKS" in environment:
        run = [environment.get(key, "") for key in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), "srun " + " ".join(run)
    return 0, 1, uuid.uuid4().hex
