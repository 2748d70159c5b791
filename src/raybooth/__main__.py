"""`python -m raybooth`, and the console script."""

import os
import sys


def run() -> None:
    from raybooth.cli import STOPPED, main

    status = main()
    if status == STOPPED:  # Ray's threads, stopped while they start workers, can crash the interpreter as it exits; all else has ended by now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
