"""What makes guix-daemon and nix-daemon of this host use our machines, and takes it back."""
