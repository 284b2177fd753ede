"""What was written: YAML files, checked, every problem at once, with file, line and field."""
