"""What the operations have in C for a CPU: their cpu.c, each compiled at its first use, as Triton does its kernels."""

import os
import platform
import shlex
import subprocess
from ctypes import CDLL
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

OPTIONS = ("-std=gnu11", "-O3", "-shared", "-fPIC")
# With OpenMP where the compiler has its library (GCC's is PyTorch's, hence so are the threads), else with one thread.
OPENMP = ("-fopenmp", "-fopenmp-simd")


@lru_cache
def library(operation: str) -> CDLL:
    """The cpu.c of an operation, compiled in half a second by `$CC` or `cc` and kept in `$XDG_CACHE_HOME/klq_fast` or
    `~/.cache/klq_fast`.

    Raises RuntimeError where there is no compiler, or no folder to keep it in.
    """
    folder = Path(__file__).parent
    source = folder / operation / "cpu.c"
    machine = (platform.system(), platform.machine(), *platform.libc_ver())
    texts = [path.read_text(encoding="utf-8") for path in (folder / "cpu.h", source)]
    made_of = repr((OPTIONS, OPENMP, os.environ.get("CC"), machine, texts))
    name = f"{operation}-{sha256(made_of.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "klq_fast"
    try:
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=cache) as own:  # a process beside this one never loads half a library
                _compile(source, Path(own) / name)
                (Path(own) / name).replace(cache / name)
        return CDLL(str(cache / name))
    except OSError as error:
        raise RuntimeError(
            f"{operation}'s part in C cannot be kept in, or loaded from, {cache}: {error}; "
            "XDG_CACHE_HOME names another folder"
        ) from error


def _compile(source: Path, target: Path) -> None:
    compiler = os.environ.get("CC") or "cc"
    for openmp in OPENMP:
        try:
            command = [*shlex.split(compiler), *OPTIONS, openmp, str(source), "-o", str(target), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return
        except (OSError, subprocess.CalledProcessError) as failure:
            error = failure
    reason = getattr(error, "stderr", "").strip() or error
    raise RuntimeError(
        f"on a CPU {source.parent.name}/{source.name} is compiled at first use, which needs a C compiler: "
        f"`{compiler}` failed: {reason}; install one (gcc, clang), or name yours in CC"
    ) from error
