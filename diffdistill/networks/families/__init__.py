"""diffusers' own model classes as networks, one file per family: how each is called, and nothing of what it is."""
