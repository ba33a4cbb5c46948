"""Trains one rank of a run, started by `simpo.run.processes`: `python -m simpo.launch.rank FOLDER`.

FOLDER holds run.yaml. Rank 0 writes into it the name of the run's folder (`finished`), or the line
of an error that it printed (`printed`). The rest of the command line is that of the process that
started this one, which the run's records quote.
"""

from __future__ import annotations

from simpo.run.parent import die_with_parent
from simpo.run.signals import exit_on_signals, set_stopped_exit_code

if __name__ == "__main__":
    exit_on_signals(interruption="")  # importing what follows takes a while
    die_with_parent()

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from simpo.config.check import load_run
from simpo.config.errors import (
    BROKEN_PIPE,
    INTERRUPTED,
    LOST,
    SAVED,
    LostError,
    SimpoError,
    Stopped,
)
from simpo.run.imports import kept_imports
from simpo.run.processes import (
    HEARTBEAT_S,
    end_process,
    finished_file,
    heartbeat_file,
    log_file,
    printed_file,
    reporting_lost_ranks,
)
from simpo.run.progress import print_all_letters
from simpo.run.unused import hide_unused


def main() -> int:
    """Train; returns the exit code."""
    _, name, *sys.argv = sys.argv
    folder = Path(name)
    print_all_letters()
    rank = int(os.environ["RANK"])
    threading.Thread(target=_heartbeat, args=(heartbeat_file(folder, rank),), daemon=True).start()
    try:
        run = load_run(folder / "run.yaml")
        set_stopped_exit_code(run.train.stopped_exit_code)
        hide_unused(run)
        with kept_imports():
            from simpo.loop.train import train

        with reporting_lost_ranks():
            run_dir = train(run)
    except LostError as error:
        # Not printed: another rank's error may be the cause.
        with log_file(folder, rank).open("a") as log:
            print(error, file=log)
        return LOST
    except SimpoError as error:
        print(error, file=sys.stderr)
        if rank == 0:
            printed_file(folder).write_text(str(error), errors="backslashreplace")
        saved = isinstance(error, Stopped) and error.exit_code == INTERRUPTED
        return SAVED if saved else error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`
        return BROKEN_PIPE
    except BaseException:
        with log_file(folder, rank).open("a") as log:
            traceback.print_exc(file=log)
        return 1
    if rank == 0:
        finished_file(folder).write_text(str(run_dir))
    return 0


def _heartbeat(file: Path) -> None:
    """Touch a file every second for as long as this process runs."""
    while True:
        file.touch()
        time.sleep(HEARTBEAT_S)


if __name__ == "__main__":
    end_process(main())
