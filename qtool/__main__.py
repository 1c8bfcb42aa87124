"""`python -m qtool`, and what `qtool` runs: an interrupt is one line from the first import on."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from qtool.cli.app import main as run_command
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted.\n")
        sys.exit(130)
    run_command()


if __name__ == "__main__":
    main()
