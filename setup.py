"""The list of packages and the native library; everything else is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


def _build_module():
    """kernels/attention/build.py, by its path: the package itself needs libraries that a build lacks."""
    path = Path(__file__).parent / "kernels" / "attention" / "build.py"
    spec = importlib.util.spec_from_file_location("attention_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildLibrary(build_ext):
    """Compiles the attention library as the package does at its first use where this could not."""

    def build_extension(self, ext):
        module = _build_module()
        try:
            module.build(Path(self.get_ext_fullpath(ext.name)).absolute())
        except module.CannotBuildError as error:
            raise CompileError(str(error)) from error


setup(
    packages=[
        *find_packages(include=["diffdistill", "diffdistill.*"]),
        "diffdistill.configs",
        "diffdistill.kernels",
        *(f"diffdistill.kernels.{name}" for name in find_packages("kernels")),
    ],
    # optional: without a compiler the package installs all the same
    ext_modules=[Extension("diffdistill.kernels.attention._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary},
)
