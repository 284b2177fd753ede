"""Environments: the root file systems that builds run in, the same on every machine."""
