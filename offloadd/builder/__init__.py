"""A build: its sources in, its steps run, its outputs back."""
