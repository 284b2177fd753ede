"""Build hooks: what guix-daemon and nix-daemon start in front of their own programs, so that machines are started on demand.

Each request of theirs waits for a new Python: only the standard library is imported here, and little of it.
"""
