"""The configuration files: one root per verb, one folder per group."""
