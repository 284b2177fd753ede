"""`python -m offload_cli`."""

from offload_cli.main import main

main()
