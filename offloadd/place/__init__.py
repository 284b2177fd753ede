"""Where one build runs: this host, a guest, a remote host.  All of them speak the build service's protocol."""
