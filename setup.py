"""The list of packages; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["diffdistill", "diffdistill.*"]),
        "diffdistill.configs",
        "diffdistill.kernels",
        *(f"diffdistill.kernels.{name}" for name in find_packages("kernels")),
    ]
)
