"""Compile a kernel for a GPU that is not here, then what Triton compiles in C when a run starts; in the `gpu` image."""

import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src

folder = Path(mkdtemp())
(folder / "kernel.py").write_text(
    "import triton, triton.language as tl\n"
    "@triton.jit\n"
    "def twice(source, target, n: tl.constexpr):\n"
    "    at = tl.arange(0, n)\n"
    "    tl.store(target + at, 2 * tl.load(source + at))\n"
)
sys.path.insert(0, str(folder))
import kernel  # noqa: E402

signature = {"source": "*fp32", "target": "*fp32", "n": "constexpr"}
source = ASTSource(fn=kernel.twice, signature=signature, constexprs={"n": 128})
print("kernel:", len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))

# A driver with nothing in it, to link against: the real one comes from the host.
(folder / "cuda.c").write_text("int cuInit(unsigned flags) { return 0; }\n")
linked = ["-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", folder / "cuda.c"]
subprocess.run(["gcc", "-shared", *map(str, linked)], check=True)
text = Path(driver.__file__).with_name("driver.c").read_text()
where = {"library_dirs": [str(folder)], "include_dirs": driver.include_dirs, "libraries": ["libcuda.so.1"]}
try:
    compile_module_from_src(src=text, name="cuda_utils", **where)
except ImportError as error:
    if "undefined symbol: cu" not in str(error):  # that is: compiled and linked, and a driver is needed to load it
        raise
print("launcher: compiled")
