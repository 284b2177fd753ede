"""What a caller asks for when it wants a template."""

from __future__ import annotations

from offloadd.model.base import Date, Name, Text, Value


class TemplateRequest(Value):
    """The template of which builds on a machine get their guests."""

    machine: Name
    date: Date | None = None
    """Whose CPU the guests have; None: the machine's own."""
    cpu: Text | None = None
    """A model in QEMU's words, whatever the date."""
