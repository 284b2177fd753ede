"""`python -m offload_cli`."""

from offload_cli.entry import main

main()
