"""How does one machine pose as three? An sshd on three loopback addresses, each with a home folder of its own.

`ray up` sees machines that share nothing but one folder. Whatever they run carries a mark in its environment, by which it
is ended. `ray stop` would end every Ray of this machine: a stand-in for it ends those of one home.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""The head's, then the workers'."""
MARK = "NEO_RAY_LOOPBACK"
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
LACKING = [name for name in ("sshd", "ssh", "ssh-keygen", "rsync", "tmux") if shutil.which(name, path=PATH) is None]
RAY = Path(sys.executable).parent / "ray"
PORTS = range(20200, 24000, 10)
"""Outside 10002 to 19999, where Ray's workers take theirs, and below what systems hand out by themselves."""


def marked(mark: str, home: Path | None = None) -> list[psutil.Process]:
    """The processes that carry the mark, and their children, which may have written over it; of one home where that is given."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")  # psutil reads none behind a long title
            if f"{MARK}={mark}".encode() in environment and (home is None or f"HOME={home}".encode() in environment):
                found.update({one.pid: one for one in (process, *process.children(recursive=True))})
    ours = {os.getpid(), *(one.pid for one in psutil.Process().parents())}
    return [process for pid, process in found.items() if pid not in ours]


def rays(mark: str, home: Path | None = None) -> list[psutil.Process]:
    """What `ray start` left of the marked processes, but for watchers of log files: they outlive a head on other machines."""
    found = []
    for process in marked(mark, home):
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            ours = command and (command[0].startswith("ray::") or any("/site-packages/ray/" in word for word in command))
            if ours and not any(word.endswith("/log_monitor.py") for word in command):
                found.append(process)
    return found


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=8)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


def wait_until(condition: Any, what: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.5)


class Loopback:
    """The machines, and the launcher that sits beside them. All files are in `folder`: a short path, for sockets."""

    def __init__(self, folder: Path, settings: Path) -> None:
        self.folder, self.settings, self.mark = folder, settings, folder.name
        self.launcher, self.shared = folder / "launcher", folder / "shared"
        self.port = next(first for first in PORTS if not any(map(taken, range(first, first + 10))))
        self.ssh_port, self.dashboard_port, self.tunnel_port = (self.port + more for more in (1, 2, 3))
        self.sshd: psutil.Process | None = None

    def home(self, address: str) -> Path:
        return self.folder / f"n{address[-1]}"

    def start(self) -> None:
        """Throw-away keys, homes, and the sshd. AssertionError: it does not answer, or with another home than ours."""
        self.shared.mkdir()
        for home in (self.launcher, *map(self.home, ADDRESSES)):
            self._furnish(home)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        # ssh takes `~` from the system's list of users, not from HOME: it is told where the key is that `ray up` gave the head.
        key = self.home(ADDRESSES[0]) / "ray_bootstrap_key.pem"
        client = [f"Port {self.ssh_port}", f"IdentityFile {key}", "LogLevel ERROR"]
        client += ["StrictHostKeyChecking no", "UserKnownHostsFile /dev/null"]
        (self.folder / "ssh_config").write_text("\n".join([*client, ""]))
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd wants it
        (self.folder / "sshd_config").write_text(self._sshd_config())
        sshd = [shutil.which("sshd", path=PATH), "-D", "-f", self.folder / "sshd_config", "-E", self.folder / "sshd.log"]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.sshd = psutil.Process(subprocess.Popen(sshd, start_new_session=True, **streams).pid)  # type: ignore[call-overload]
        for address in ADDRESSES:
            wait_until(lambda address=address: in_use(self.ssh_port, address), "sshd listens", 10)
            user = f"{getuser()}@{address}"
            found = self.run(f"ssh -i {self.folder / 'user'} {user} 'echo $HOME; command -v ray || true'")
            assert found.split() == [str(self.home(address))], f"a machine has its own home, and no Ray yet: {found}"

    def _sshd_config(self) -> str:
        """What every machine has in its environment, too: the mark, and a small machine's share of threads and time."""
        lines = [f"ListenAddress {address}:{self.ssh_port}" for address in ADDRESSES]
        lines += [f"HostKey {self.folder / 'host'}", f"AuthorizedKeysFile {self.folder / 'user.pub'}", "PidFile none"]
        lines += ["StrictModes no", "UsePAM no", "PasswordAuthentication no", "PermitRootLogin prohibit-password"]
        for address in ADDRESSES:
            home = self.home(address)
            own = {"HOME": home, "TMPDIR": home / "tmp", "TMUX_TMPDIR": home / "tmp", "PYTHONPATH": home / "neo_ray"}
            own |= {MARK: self.mark, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": 1}
            own |= {"RAY_gcs_rpc_server_reconnect_timeout_s": 10}  # how long a node waits for a head that is gone
            lines += [f"Match LocalAddress {address}", f"SetEnv {' '.join(f'{name}={value}' for name, value in own.items())}"]
        return "\n".join([*lines, ""])

    def _furnish(self, home: Path) -> None:
        """A home as `deploy/local.yaml` leaves it, its environment being ours."""
        binaries = home / "venv" / "bin"
        binaries.mkdir(parents=True)
        (home / "tmp").mkdir()
        (home / ".profile").write_text('. "$HOME/.bashrc"\n')
        (home / ".bashrc").touch()
        stop = f'exec {sys.executable} {__file__} "{self.mark}" "$HOME"'
        commands = {
            "ray": f'if [ "$1" = stop ]; then {stop}; fi\nexec {RAY} "$@"',
            "python": f'exec {sys.executable} "$@"',
            "ssh": f'exec {shutil.which("ssh")} -F {self.folder / "ssh_config"} "$@"',
        }
        for name, text in commands.items():
            (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
            (binaries / name).chmod(0o755)

    def write_project(self, sweep: Path) -> None:
        """What `ray up` finds where the launcher sits: the project with `sweep` as `sweeps/rank.yaml`, and the cluster's file.

        That one has this machine's addresses, ports and key; what it would install is here already.
        """
        shutil.copytree(ROOT / "neo_ray", self.launcher / "neo_ray", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt", "LICENSE"):
            shutil.copyfile(ROOT / name, self.launcher / name)
        (self.launcher / "sweeps").mkdir()
        shutil.copyfile(sweep, self.launcher / "sweeps" / "rank.yaml")
        text = self.settings.read_text(encoding="utf-8")
        beside = "--dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000"
        changes = {
            "--port=6379": f"--port={self.port} --num-cpus=0 --ray-client-server-port={self.port + 4} {beside}",
            "--dashboard-port=8265": f"--dashboard-port={self.dashboard_port}",
            "--address=$RAY_HEAD_IP:6379": f"--address=$RAY_HEAD_IP:{self.port} --num-cpus=1 --temp-dir=$TMPDIR/ray {beside}",
            "/mnt/shared": str(self.shared),
        }
        for old, new in changes.items():
            assert old in text, f"{self.settings} says no more {old}"
            text = text.replace(old, new)
        config: dict[str, Any] = yaml.safe_load(text)
        config["cluster_name"] = self.mark
        config["provider"].update(head_ip=ADDRESSES[0], worker_ips=list(ADDRESSES[1:]))
        config["auth"] = {"ssh_user": getuser(), "ssh_private_key": str(self.folder / "user")}
        kept = [line for line in config["setup_commands"] if not ("sudo " in line or "pip install" in line)]
        assert len(kept) == len(config["setup_commands"]) - 3, "packages, the mount and the environment are left out"
        config["setup_commands"] = kept
        file = self.launcher / self.settings.relative_to(ROOT)
        file.parent.mkdir()
        file.write_text(yaml.safe_dump(config))

    def run(self, command: str, check: bool = True, seconds: float = 300) -> str:
        """What a command of the launcher's prints."""
        done = subprocess.run(
            ["bash", "-c", command],
            env=self.environment,
            cwd=self.launcher,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.launcher / 'venv' / 'bin'}:{os.environ['PATH']}"
        own = {"HOME": self.launcher, "TMPDIR": self.launcher / "tmp", "PATH": path, "TERM": "xterm", MARK: self.mark}
        return {**os.environ, **{name: str(value) for name, value in own.items()}, "RAY_AUTH_MODE": "token"}


def taken(port: int) -> bool:
    return any(in_use(port, address) for address in ("127.0.0.1", *ADDRESSES))


def in_use(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


@contextlib.contextmanager
def machines(folder: Path, settings: Path) -> Iterator[Loopback]:
    """Up, with keys and homes; at the end nothing of it runs any more."""
    cluster = Loopback(folder, settings)
    try:
        cluster.start()
        yield cluster
    finally:
        with contextlib.suppress(psutil.Error):  # sshd writes its title over its environment
            end([*cluster.sshd.children(recursive=True), cluster.sshd] if cluster.sshd else [])
        end(marked(cluster.mark))


if __name__ == "__main__":  # in place of `ray stop`: the mark, and the home of the machine
    end(rays(sys.argv[1], Path(sys.argv[2])))
