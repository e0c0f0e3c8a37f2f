"""vLLM's CPU worker for ranks that share a sampler. Only vLLM imports it, by its name."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

SHARED_MEMORY = "/dev/shm"


class RunCPUWorker(CPUWorker):
    """A worker whose shared memory is named after its run, and is freed when its ranks end, in whatever way.

    vLLM names the ranks' shared memory after the port in their init method. Under a launcher this is "env://", without
    a port: two runs on one machine used the same name, and memory left by a killed run kept the next from starting. The
    name comes from the engine's `additional_config["run"]`, the same on all ranks.
    """

    def init_device(self) -> None:
        settings: Any = self.vllm_config.additional_config
        # The process group exists already: the init method is used only for the name.
        self.distributed_init_method = f"env://:{settings['run']}"
        super().init_device()
        # All ranks have opened it by now. Once unlinked, it is freed when the last process that uses it ends.
        for name in os.listdir(SHARED_MEMORY):
            if settings["run"] in name:
                with suppress(FileNotFoundError):  # another rank was faster
                    os.unlink(os.path.join(SHARED_MEMORY, name))
