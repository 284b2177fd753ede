"""Running QEMUs: each owned by one task, found again after a restart through its directory and its QMP socket."""
