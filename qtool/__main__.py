"""`python -m qtool`."""

from qtool.cli.app import main

main()
