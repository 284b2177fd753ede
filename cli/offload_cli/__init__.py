"""The `offload` command.  It talks to the daemon through `offloadd.client` alone."""
