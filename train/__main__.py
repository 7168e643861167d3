"""`python -m train --config FILE [--section.key value ...] [--dry_run]`: start or resume a run."""

import os
import sys

from train import settings
from train.loop import set_up, train
from train.ranks import leave, lost_contact


def main() -> None:
    """Exit status 0: done; 2: the configuration or the data is wrong; 1: something failed in the middle of work."""
    status = 2
    try:
        config, dry_run = settings.parse(sys.argv[1:])
        run = set_up(config)
        status = 1  # From here on a failure is one in the middle of work.
        train(run, dry_run)
    except (ValueError, OSError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and lost_contact(error)
        if (isinstance(error, RuntimeError) and not lost) or (status == 1 and "ROPEWAY_TRACEBACK" in os.environ):
            raise
        message: object = error
        if lost:
            status, reason = 1, str(error).strip().splitlines()[-1]
            message = ("lost contact with another rank, whose own message says why; start the same command to go on "
                       f"from the newest checkpoint ({reason})")  # fmt: skip
        try:
            settings.fail(message, status)
        finally:
            leave(status)


if __name__ == "__main__":
    main()
