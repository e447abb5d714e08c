"""Every backend against the dense reference in float64."""
