"""`python -m simpo.member FOLDER`, as command.txt of older runs has it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("simpo.launch.member", run_name="__main__")
