"""`python -m raybooth`, and the console script."""

import os
import sys


def run() -> None:
    from raybooth.cli import STOPPED, main

    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads what is printed any more, as after `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes as it exits
        sys.exit(1)
    if status == STOPPED:  # Ray's threads, stopped while they start workers, can crash the interpreter as it exits; all else has ended by now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
