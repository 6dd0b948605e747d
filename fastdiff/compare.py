"""`python -m fastdiff.compare`: every method of the paper on one teacher. It trains them, so it lives in `train`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("train.compare", run_name="__main__", alter_sys=True)
