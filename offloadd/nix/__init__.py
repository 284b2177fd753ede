"""Nix: what nix-daemon reads and says, in its own formats."""
