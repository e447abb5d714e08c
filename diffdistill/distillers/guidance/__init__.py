"""Guidance distillation: one network call in place of two."""
