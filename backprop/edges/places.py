"""Where things lie that are not a run's: the cache, and llama.cpp. Imports nothing of ours, since the image builds llama.cpp by it."""

import os
import sys
from pathlib import Path

LLAMA_CPP_VERSION = "0.3.36"
"""Release of llama-cpp-python; requirements.lock pins the same."""
LLAMA_PROGRAMS = ("imatrix", "quantize", "gguf-split")
"""Of llama.cpp, for what its bindings lack."""


def cache_dir() -> Path:
    """Give the folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "backprop"


def llama_cpp_home() -> Path:
    """Give the folder that holds llama.cpp's converter: `BACKPROP_LLAMA_CPP`, or a folder of the cache."""
    chosen = os.environ.get("BACKPROP_LLAMA_CPP")
    return Path(chosen).expanduser() if chosen else cache_dir() / f"llama.cpp-{LLAMA_CPP_VERSION}"


def llama_programs() -> Path:
    """Give the folder of its programs and libraries."""
    return llama_cpp_home() / "tools"


def llama_library(name: str) -> Path:
    """Give where a compiled library lies."""
    return llama_programs() / f"lib{name}.{'dylib' if sys.platform == 'darwin' else 'so'}"
