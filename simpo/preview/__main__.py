"""`python -m simpo.preview`, the same as `simpo preview`."""

import sys

if __name__ == "__main__":
    from simpo.__main__ import main

    main(["preview", *sys.argv[1:]])
