"""The theory of quantization, runnable: every figure is measured when it is asked for."""
