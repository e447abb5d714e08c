"""Kernels of the package's own. `attention`: block-sparse attention."""
