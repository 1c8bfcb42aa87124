"""`python -m qtool`, and what `qtool` runs: an interrupt is one line from the first import on."""

import sys


def start_program() -> None:
    """Run the command line."""
    try:
        from qtool.cli.app import main
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted.\n")
        sys.exit(130)
    main()


if __name__ == "__main__":
    start_program()
