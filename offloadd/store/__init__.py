"""What must survive the daemon: builds and the states of machines, in SQLite."""
