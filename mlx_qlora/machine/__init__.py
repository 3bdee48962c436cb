"""What a machine is like, and what on it would keep a run from working: `mlx-qlora doctor`."""
