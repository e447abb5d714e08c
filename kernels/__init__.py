"""Block-sparse attention kernels will live here; none is shipped yet."""
