"""What the lab takes from Debian's archive: fetched with apt, unpacked or built once, and kept in the cache."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.errors import LabError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ARCHIVE = "is the Debian archive reachable? apt-get update"
# Ganeti, by version: Debian 12's, which apt knows on this machine, and Debian 13's; and those of its dependencies that
# its KVM code imports, always Debian 12's.
GANETI = {"3.0": ("ganeti", "ganeti-3.0"), "3.1": ("ganeti", "ganeti-3.1")}
DEPENDENCIES = ("python3-bitarray", "python3-paramiko", "python3-pycurl", "python3-pyinotify", "python3-simplejson")
TRIXIE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {} trixie main\n"


def kept(kind: str, name: str, make: Callable[[Path], Path]) -> Path:
    """The directory *name* of *kind* in the cache; if it is not there, *make* makes it below an empty directory.

    Raises LabError when it cannot be kept.
    """
    cache = CACHE / kind
    done = cache / name
    if done.is_dir():
        return done
    cache.mkdir(parents=True, exist_ok=True)
    # What is half made is never seen: it gets its name only when it is whole.
    with tempfile.TemporaryDirectory(dir=cache, prefix="tmp-") as scratch:
        made = make(Path(scratch))
        try:
            made.rename(done)
        except OSError as e:
            if not done.is_dir():
                raise LabError(f"cannot keep {done}: {e}", "is the cache writable?") from e
            # Somebody else made the same in the meantime; theirs is as good.
    return done


@functools.cache
def ganeti(version: str = "3.0") -> Path:
    """The directory with the files of the packages of that *version* of Ganeti."""
    here = (*GANETI["3.0"], *DEPENDENCIES) if version == "3.0" else DEPENDENCIES
    listed = tool(["apt-get", "-q", "--print-uris", "download", *here], ARCHIVE)
    files = sorted(re.findall(r"\S+\.deb", listed))

    def unpack(scratch: Path) -> Path:
        tool(["apt-get", "-q", "download", *here], ARCHIVE, cwd=scratch)
        if version != "3.0":
            download_of_trixie(GANETI[version], scratch)
        for deb in scratch.glob("*.deb"):
            unpack_package(deb, scratch / "root")
        return scratch / "root"

    return kept("kvm-ifup-ganeti", hashlib.sha256("\n".join([version, *files]).encode()).hexdigest()[:12], unpack)


def download_of_trixie(packages: Sequence[str], to: Path) -> None:
    """Fetch *packages* of Debian 13 into the directory *to*, by an apt that knows nothing else."""
    asked = ["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"]
    found = [line.split()[1] for line in tool(asked, ARCHIVE).splitlines() if line.startswith("Debian ")]
    mirror = next((one for one in found if "security" not in one), None)
    if mirror is None:
        raise LabError("apt on this machine knows no Debian mirror", "apt-get update")
    own = to / "apt"
    for directory in ("lists/partial", "archives/partial"):
        (own / directory).mkdir(parents=True)
    (own / "sources.list").write_text(TRIXIE.format(mirror))
    settings = {
        "Dir::Etc::SourceList": own / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": own,
        "Dir::State::Status": "/dev/null",
        "Dir::Cache": own,
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
    }
    options = [f"-o={name}={value}" for name, value in settings.items()]
    tool(["apt-get", "-q", *options, "update"], ARCHIVE)
    tool(["apt-get", "-q", *options, "download", *packages], ARCHIVE, cwd=to)


def unpack_package(deb: Path, to: Path) -> None:
    """Unpack a package's files; none of its scripts run."""
    tool(["dpkg", "-x", str(deb), str(to)], "is there room in the cache's file system?")


def tool(
    argv: Sequence[str],
    hint: str,
    cwd: Path | None = None,
    stdin: str | None = None,
    stdout: int = subprocess.PIPE,
) -> str:
    """Runs one tool and returns its output; LabError with its last line when it fails or is missing."""
    env = dict(os.environ, LC_ALL="C")
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, input=stdin, stdout=stdout, stderr=subprocess.PIPE, text=True, check=True
        )
    except FileNotFoundError as e:
        raise LabError(f"{argv[0]} is not installed", f"apt-get install {argv[0]}") from e
    except subprocess.CalledProcessError as e:
        last = (e.stderr.strip().splitlines() or ["no message"])[-1]
        raise LabError(f"`{' '.join(argv[:3])} …` failed: {last}", hint) from e
    return done.stdout or ""
