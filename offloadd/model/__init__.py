"""The values that everything else speaks of: frozen, checked, without I/O."""
