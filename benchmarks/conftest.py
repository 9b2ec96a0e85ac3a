"""Facts about torch and the CPU in pytest-benchmark's machine info."""

from __future__ import annotations

import torch

import inherit_kernels
from benchmarks import roofline, store


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["cpu_name"] = roofline.cpu_name()
    machine_info["caches"] = {name: size for name, size in roofline.capacities(1).items() if name != "memory"}
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["mkldnn"] = torch.backends.mkldnn.is_available()
    machine_info["commit"] = store.commit()
    machine_info["inherit_kernels"] = inherit_kernels.status().facts
