"""Entry point of `sandfleet` and of `python -m worker`."""

import io
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from worker.cli.app import run

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks must not keep the rest from being shown.
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
