"""Adversarial terms that are methods of their own, for composites."""
