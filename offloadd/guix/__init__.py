"""Guix: what guix-daemon reads and says, in its own formats."""
