"""The daemon: owns the machines, queues the builds, answers the API."""
