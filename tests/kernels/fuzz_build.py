"""Build the fuzz program of the attention library's C interface: the sources, with sanitizers. Usage: OUTPUT."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def main(output: str) -> None:
    build = runpy.run_path(str(ROOT / "kernels" / "attention" / "build.py"))
    native, command, objects = build["NATIVE"], build["compiler"](), []
    sources = {native / name: flags for name, flags in build["SOURCES"].items()}
    sources[Path(__file__).parent / "fuzz.cpp"] = ()
    with tempfile.TemporaryDirectory() as folder:
        for source, flags in sources.items():
            objects.append(f"{folder}/{source.name}.o")
            # memory kept between calls would hide reads past its end
            words = [*build["COMPILE"], *SANITIZE, *flags, "-DKEPT_BYTES=0", f"-I{native}", "-c", str(source)]
            subprocess.run([*command, *words, "-o", objects[-1]], check=True)
        subprocess.run([*command, *SANITIZE, "-pthread", *objects, "-o", output], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
