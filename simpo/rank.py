"""One rank of a run that `simpo.processes` started: `python -m simpo.rank FOLDER ...`.

FOLDER holds run.yaml, the settings; rank 0 leaves metrics.json in it. The rest of the command line
is that of the run, which its records quote.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from simpo.config import load_run
from simpo.errors import INTERRUPTED, SimpoError
from simpo.processes import end_with_parent
from simpo.train import train


def main() -> int:
    """Train; returns the exit code."""
    folder = Path(sys.argv.pop(1))
    end_with_parent()
    rank = int(os.environ["RANK"])
    try:
        metrics = train(load_run(folder / "run.yaml"))
    except SimpoError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException:
        # Not where rank 0 prints: it may be the mere echo of another rank's end.
        with (folder / f"rank-{rank}.log").open("a") as log:
            traceback.print_exc(file=log)
        return 1
    if rank == 0:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Libraries' threads have been seen to abort a process that ends in order.
    os._exit(code)
