"""Block-sparse attention for GPUs in Triton: kernels, their configurations, and their launch."""
