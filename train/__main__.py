"""`python -m train --config FILE [--section.key value ...] [--dry_run]`: start or resume a run."""

import os
import sys

from train import settings
from train.loop import set_up, train


def main() -> None:
    """Exit status 0: done; 2: the configuration or the data is wrong; 1: something failed in the middle of work."""
    try:
        config, dry_run = settings.parse(sys.argv[1:])
        run = set_up(config)
    except (ValueError, OSError) as error:
        settings.fail(error, 2)
    try:
        train(run, dry_run)
    except (ValueError, OSError) as error:
        if "ROPEWAY_TRACEBACK" in os.environ:
            raise
        settings.fail(error, 1)


if __name__ == "__main__":
    main()
