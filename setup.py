"""Install the module, the commands and the configuration."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "kvmifup/__init__.py").read_text(encoding="utf-8"))
assert VERSION

setup(
    name="kvm-ifup",
    version=VERSION[1],
    description="Wire the taps of KVM guests, in separate phases before and after a live migration",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    python_requires=">=3.11",
    install_requires=["pyroute2>=0.7.2", "tomli>=2.0"],
    packages=find_packages(include=["kvmifup", "kvmifup.*"]),
    package_data={"kvmifup": ["py.typed"]},
    scripts=[str(path.relative_to(HERE)) for path in sorted((HERE / "scripts").iterdir())],
    data_files=[("/etc/kvm-ifup", ["etc/config.toml"])],
)
