"""QLoRA on a Mac: quantize, train and use adapters in the memory you have, on MLX."""

__version__ = "0.1.0"
