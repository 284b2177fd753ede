"""A running guest as a system that we can talk to: secrets in, frames of a build back and forth."""
