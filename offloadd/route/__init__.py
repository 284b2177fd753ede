"""Which machine takes a build, and why the others do not: a pure function of frozen values.

Four questions, in this order: can the machine do it, may it, does its user want another one (`obstacle`), and what does it cost
(`decision`).  The first three leave the candidates; the fourth ranks them, part by part in the order of `Cost`.
"""

from offloadd.route.decision import Candidate, Cost, Decision, find_route
from offloadd.route.needs import Emulation, MachineFacts, Needs

__all__ = ["Candidate", "Cost", "Decision", "Emulation", "MachineFacts", "Needs", "find_route"]
