"""Lightning Fabric's parts that are used here, imported without what its import changes.

It sets an environment variable by which ``torch.cuda.is_available`` looks for NVML anew at each call, as torch's
optimizers make at each step: 0.04 to 0.2 ms where torch is built for CUDA and there is no GPU.
"""

import os

_NAME = "PYTORCH_NVML_BASED_CUDA_CHECK"
_before = os.environ.get(_NAME)

from lightning_fabric import Fabric  # noqa: E402
from lightning_fabric.loggers import Logger  # noqa: E402
from lightning_fabric.plugins.environments import (  # noqa: E402
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy  # noqa: E402
from lightning_fabric.utilities.exceptions import MisconfigurationException  # noqa: E402

if _before is None:
    os.environ.pop(_NAME, None)
else:
    os.environ[_NAME] = _before

__all__ = [
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "LightningEnvironment",
    "Logger",
    "MisconfigurationException",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
]
