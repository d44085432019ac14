"""`python -m tests.strategies.waiter FILE`: waits as a rank does, then writes who it is."""

import os
import sys
from pathlib import Path

from src.strategies.early_ranks import wait

if __name__ == "__main__":
    wait()
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    Path(f"{sys.argv[1]}.{os.environ['LOCAL_RANK']}").write_text(" ".join(os.environ[name] for name in names))
