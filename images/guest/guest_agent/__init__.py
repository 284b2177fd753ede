"""The agent of a guest: what it does for the host over a virtio-serial port.  `docs/agent.md` has the protocol."""
