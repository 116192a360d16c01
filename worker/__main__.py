"""Entry point of `sandfleet` and of `python -m worker`."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from worker.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
