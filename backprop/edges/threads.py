"""How the threads of numeric libraries wait for each other."""

import os


def spin_briefly() -> None:
    """Let OpenMP's threads sleep after a few microseconds of spinning for their turn, unless the user's variables say otherwise.

    To be called before torch or llama.cpp is loaded. Beside other work on the same cores, threads that spin for milliseconds,
    as GNU's library has it, keep each other from it: docs/benchmarks.md has what that costs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
