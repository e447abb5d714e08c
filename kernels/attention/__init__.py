"""Block-sparse attention: `block_sparse_attention`, `explain` in api, the layout, its converters, the backends."""
