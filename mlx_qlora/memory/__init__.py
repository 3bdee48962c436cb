"""What memory holds now, and the limits MLX is asked to keep."""

from mlx_qlora.memory.limits import memory_limits
from mlx_qlora.memory.monitor import MemoryMonitor, MemorySample, device_limit_bytes

__all__ = ["MemoryMonitor", "MemorySample", "device_limit_bytes", "memory_limits"]
