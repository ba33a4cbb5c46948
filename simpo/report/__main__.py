"""`python -m simpo.report`, the same as `simpo report`."""

import sys

if __name__ == "__main__":
    from simpo.__main__ import main

    main(["report", *sys.argv[1:]])
