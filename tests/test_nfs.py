"""Does what machines share work on a network file system? On a disk, and over NFS: a kernel's server and two clients of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from doors import ROOT
from loopback import PATH, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MACHINE = ROOT / "tests" / "nfs_machine.sh"
NEEDED = ("linux.uml", "exportfs", "rpc.nfsd", "rpc.mountd", "mount.nfs4", "modprobe", "ip", "nsenter", "unshare")
LACKING = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
ALL_HELD, MOUNTED = "two machines: all held", "/run/two nfs4 "


def test_two_machines_on_one_disk(tmp_path: Path) -> None:
    """The same as below, so that what is asked there is known to hold where the file system is one of this machine."""
    command = [sys.executable, ROOT / "tests" / "two_machines.py", tmp_path, tmp_path]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and ALL_HELD in done.stdout, done.stdout + done.stderr


def test_two_machines_with_nfs_in_common(short_folder: Path) -> None:
    """User-Mode Linux: a kernel of its own, so that a machine without NFS in its kernel has it, too. Debian's packages
    user-mode-linux, nfs-kernel-server, nfs-common, iproute2 and kmod; minutes on an idle machine."""
    if LACKING or os.geteuid() != 0:
        pytest.skip(f"not here: {', '.join(LACKING) or 'root'}")
    job, shared = short_folder / "job", "{}/shared"
    job.write_text(
        "#!/bin/bash\n"
        f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n"
        f"mkdir {shared.format('/run/one')}\n"
        f"{sys.executable} {ROOT / 'tests' / 'two_machines.py'} {shared.format('/run/one')} {shared.format('/run/two')}\n"
    )
    job.chmod(0o755)
    machine = ["linux.uml", "mem=3G", "rootfstype=hostfs", "rootflags=/", "rw", f"init={MACHINE}", f"NFS_JOB={job}"]
    console = ["con=null", "con0=fd:0,fd:1", "ssl=null", "quiet"]
    said = short_folder / "said"
    with said.open("w") as file:
        process = subprocess.Popen(
            [*machine, *console],
            cwd=short_folder,
            env={**os.environ, "PATH": PATH},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with contextlib.suppress(AssertionError):
            wait_until(lambda: MOUNTED in said.read_text(errors="replace") or process.poll() is not None, "it is up", 180)
        if MOUNTED not in said.read_text(errors="replace"):
            pytest.skip("not here: no User-Mode Linux with NFS starts")
        wait_until(lambda: process.poll() is not None, "all was asked", 900)
        assert ALL_HELD in said.read_text(errors="replace"), said.read_text(errors="replace")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
