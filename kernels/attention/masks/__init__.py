"""Block masks for attention, one file per method."""
