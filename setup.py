"""Maps the top-level kernels/ folder to the package klq_fast.kernels; pyproject.toml holds everything else."""

from setuptools import find_namespace_packages, setup

kernels = find_namespace_packages("kernels")
setup(
    packages=[
        "klq_fast",
        "klq_fast.demo",
        "klq_fast.kernels",
        *(f"klq_fast.kernels.{name}" for name in kernels),
    ],
    package_dir={"klq_fast": "klq_fast", "klq_fast.kernels": "kernels"},
    package_data={"": ["py.typed", "cpu.c", "cpu.h"]},
)
