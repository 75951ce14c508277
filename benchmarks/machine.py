"""Describes the machine and the software that produced a table of figures."""

import os
import platform
import re
from pathlib import Path
from types import ModuleType

import jax


def describe_machine(*packages: ModuleType) -> str:
    """Returns the versions of packages, the machine, the backend and the device."""
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    return (
        f"Python {platform.python_version()}, {versions}, {platform.machine()}, {cpu}, "
        f"{os.cpu_count()} cores, {jax.default_backend()}, {jax.devices()[0].device_kind}"
    )
