"""The host's end of the agent that runs in our own guests, over a virtio-serial port.  `docs/agent.md` has the protocol."""

from offloadd.guest.agent.client import Agent, open_agent
from offloadd.guest.agent.process import AgentProcess

__all__ = ["Agent", "AgentProcess", "open_agent"]
