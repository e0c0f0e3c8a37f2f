"""vLLM's CPU worker for ranks that share a sampler. Imported by vLLM alone, which finds it by its name."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY = "/dev/shm"


class RunCPUWorker(CPUWorker):
    """A worker whose shared memory bears its run's name, and is gone when its ranks are, however they end.

    vLLM names what ranks share after the port in their init method. Under a launcher that is "env://", without one: two
    runs on a machine met in one name, and what a killed run left kept the next from starting. The name comes with the
    engine's `additional_config["run"]`, the same on all ranks.
    """

    def init_device(self) -> None:
        settings: Any = self.vllm_config.additional_config
        # The ranks' group is there already: of the init method only the name is used.
        self.distributed_init_method = f"env://:{settings['run']}"
        super().init_device()
        # All ranks have opened it by now. What has no name any more goes with the last process that holds it.
        for name in os.listdir(SHARED_MEMORY):
            if settings["run"] in name:
                with suppress(FileNotFoundError):  # another rank was faster
                    os.unlink(os.path.join(SHARED_MEMORY, name))
