"""`python -m raybooth`, and the console script."""

import sys


def run() -> None:
    from raybooth.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
