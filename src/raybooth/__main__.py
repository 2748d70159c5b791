"""`python -m raybooth`, and the console script."""

import os
import sys


def run() -> None:
    from raybooth.cli import STOPPED, main

    status = main()
    if status == STOPPED:  # all has ended by now; but Ray's threads, stopped as they start workers, can crash the interpreter as it ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
