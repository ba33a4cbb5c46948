"""Keeps `python -m simpo.member FOLDER`, which command.txt of older runs contains."""

import runpy

if __name__ == "__main__":
    runpy.run_module("simpo.launch.member", run_name="__main__")
