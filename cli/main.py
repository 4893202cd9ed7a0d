"""The console script ``dolmen``: nothing but the way into ``cli/commands.py``.

Promises: Ctrl-C ends with one line and exit code 130 at any moment, also while the commands are imported,
which takes most of a short command's time. So nothing is imported here that takes time.
"""

import sys

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count. ``cli.output.Exit`` has it too."""


def main() -> None:
    try:
        from cli.commands import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
