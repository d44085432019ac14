"""Lightning's launcher of a node's other processes, over those that `early_ranks` has started."""

import os

from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from .early_ranks import release


class EarlyLauncher(_SubprocessScriptLauncher):
    """Lightning's, which takes the processes that wait already, if there are any."""

    @override
    def _call_children_scripts(self) -> None:
        cluster = self.cluster_environment
        shared = {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": str(cluster.main_port)}
        shared |= {"NODE_RANK": str(cluster.node_rank()), "WORLD_SIZE": str(self.num_processes * self.num_nodes)}
        shared |= {name: value for name, value in os.environ.items() if name.startswith("PL_")}  # the seed
        self.procs = release([shared | {"LOCAL_RANK": str(rank)} for rank in range(1, self.num_processes)])
        if self.procs:
            os.environ.update(shared | {"LOCAL_RANK": "0"})
        else:
            super()._call_children_scripts()
