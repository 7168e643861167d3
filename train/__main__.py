"""`python -m train --config FILE [--section.key value ...] [--dry_run]`: start or resume a run."""

import os
import sys
from contextlib import suppress

from data.command import fail, out_of_memory
from train import settings
from train.loop import Run, set_up, train
from train.ranks import leave, lost_contact


def main() -> None:
    """Exit status 0: done; 2: the configuration or the data is wrong; 1: something failed in the middle of work."""
    status = 2
    run: Run | None = None
    try:
        config, dry_run = settings.parse(sys.argv[1:])
        run = set_up(config)
        status = 1  # From here on a failure is one in the middle of work.
        train(run, dry_run)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        known = isinstance(error, ValueError | OSError)
        full, lost = (None, None) if known else (out_of_memory(error), lost_contact(error))
        if not (known or full or lost) or (status == 1 and "ROPEWAY_TRACEBACK" in os.environ):
            raise
        message: object = error
        if full:
            status = 1
            message = (f"{full}; a smaller model, more engine.micro_batches, fewer data.rows_per_step or "
                       "engine.activation_checkpointing need less")  # fmt: skip
        elif lost:
            status = 1
            message = ("lost contact with another rank, whose own message says why; start the same command to go on "
                       f"from the newest checkpoint ({lost})")  # fmt: skip
        try:
            fail(message, status)
        finally:
            if run:  # What is written in the background needs no other rank.
                with suppress(OSError):
                    run.saver.finish()
            leave(status)


if __name__ == "__main__":
    main()
