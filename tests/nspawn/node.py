"""A node under systemd-nspawn: PID 1 is systemd, the kernel is this machine's.

    with Node("a") as node:
        node.run("dpkg", "-i", ...)

Its root is a throw-away layer over the tree of `tools/nspawn-tree`. It has a
network of its own, with nothing but lo, its own cgroup v2 tree and its own
bpffs, so agents of the host and of other nodes do not see it. Hosts in it are
network namespaces, as in the netns suite.

The supervisor stops the node when this process dies; what a killed run
leaves (a mount, folders, empty cgroups) the next node sweeps.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.progs.program import BedError, eventually

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "nspawn"
CHECKOUT = "/mnt/meshbpf"
"""Where a node sees this checkout's tests."""
PACKAGES = "/mnt/packages"
"""Where a node sees the built packages."""
BOOT_LIMIT_S = 60.0
RUN_LIMIT_S = 60.0
PREFIX = "meshbpf-node-"

# What systemd-nspawn forbids beyond its capabilities, and the agent needs.
_SYSTEM_CALLS = "bpf perf_event_open @keyring"
_ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "DEBIAN_FRONTEND": "noninteractive",
}


class Node:
    """One booted machine. Its name, with PREFIX, is unique on this host."""

    def __init__(self, name: str, tree: Path, packages: Path) -> None:
        self.name = f"{PREFIX}{name}-{os.getpid()}"
        self._tree, self._packages = tree, packages
        self._work = CACHE / self.name
        self.root = self._work / "root"
        self._console = CACHE / f"{self.name}.console"
        self._supervisor: subprocess.Popen[bytes] | None = None
        self.leader = 0
        """PID 1 of the node, as this host numbers it."""

    def __enter__(self) -> Self:
        sweep()
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _boot(self) -> None:
        layers = [self._work / "upper", self._work / "work", self.root]
        for folder in layers:
            folder.mkdir(parents=True)
        options = f"lowerdir={self._tree},upperdir={layers[0]},workdir={layers[1]}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, self.root], check=True)
        for place in (CHECKOUT, PACKAGES):
            (self.root / place.lstrip("/")).mkdir(parents=True)
        with self._console.open("wb") as console:
            # In a cgroup of its own: with --keep-unit, two in one cgroup would be one.
            enter = " ".join(f"echo $$ >{group}/cgroup.procs &&" for group in self._make_cgroups())
            self._supervisor = subprocess.Popen(
                ["sh", "-c", f'{enter} exec "$@"', "sh", *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                    # The agent mounts bpffs in /sys and sets sysctls of pods.
                    "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "yes",
                },
                start_new_session=True,
            )
        self.leader = eventually("the node has a PID 1", self._find_leader, BOOT_LIMIT_S)
        eventually("systemd is up", self._is_up, BOOT_LIMIT_S)

    def _command(self) -> list[str]:
        binds = [f"--bind-ro={ROOT / 'tests'}:{CHECKOUT}/tests"]
        binds.append(f"--bind-ro={self._packages}:{PACKAGES}")
        binds += [
            f"--bind-ro={path}" for path in ("/usr/src", "/lib/modules") if Path(path).exists()
        ]
        return [
            *("setpriv", "--pdeathsig", "TERM"),
            *("systemd-nspawn", "--quiet", f"--directory={self.root}", "--boot"),
            *("--register=no", "--keep-unit", f"--machine={self.name}", "--private-network"),
            *("--resolv-conf=off", "--capability=all", f"--system-call-filter={_SYSTEM_CALLS}"),
            *("--console=pipe", *binds),
        ]

    def _find_leader(self) -> int:
        assert self._supervisor is not None
        if self._supervisor.poll() is not None:
            raise BedError(f"systemd-nspawn ended:\n{self.console()}")
        children = Path(f"/proc/{self._supervisor.pid}/task/{self._supervisor.pid}/children")
        for pid in map(int, children.read_text().split()):
            # Its first child only prepares the second, which becomes PID 1.
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/exe").endswith("/systemd"):
                    return pid
        return 0

    def _is_up(self) -> bool:
        with contextlib.suppress(BedError):
            done = self.run("systemctl", "is-system-running", check=False)
            if done.stdout.strip() == "degraded":
                failed = self.run("systemctl", "list-units", "--failed", "--plain").stdout
                raise AssertionError(f"the node is degraded:\n{failed}")
            return done.stdout.strip() == "running"
        return False

    def close(self) -> None:
        """End it, as by pulling the plug, and remove every trace."""
        if self._supervisor is not None:
            if self.leader and self._supervisor.poll() is None:
                os.kill(self.leader, signal.SIGKILL)
            else:
                self._supervisor.terminate()
            self._supervisor.wait(30.0)
        _remove(self._work)
        self._console.unlink(missing_ok=True)

    def console(self) -> str:
        """What PID 1 and the supervisor have said."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    # --- inside ---------------------------------------------------------------

    def argv(self, argv: Sequence[str], netns: str = "") -> list[str]:
        """The command line that runs `argv` in the node, or in a namespace of it."""
        command = ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-C"]
        command += [f"--wdns={CHECKOUT}", "env", "-i"]
        command += [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        if netns:
            command += ["nsenter", f"--net=/run/netns/{netns}"]
        return [*command, *argv]

    def run(
        self, *argv: str, netns: str = "", check: bool = True, limit_s: float = RUN_LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; BedError with what it said for a failure when `check`."""
        try:
            done = subprocess.run(
                self.argv(argv, netns), capture_output=True, text=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BedError(f"not within {limit_s} s: {' '.join(argv)}") from error
        if check and done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise BedError(f"exit {done.returncode}: {' '.join(argv)}\n{said}")
        return done

    def start(self, *argv: str, netns: str = "") -> subprocess.Popen[str]:
        """Start a command with pipes for its input and output.

        A signal would reach nsenter and not the command: let its input end.
        """
        return subprocess.Popen(
            self.argv(argv, netns), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def shell(self, script: str) -> str:
        """Run a shell script that stops at the first error; its output."""
        return self.run("sh", "-euc", script).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of the node."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(mode)

    def read(self, path: str) -> str:
        """A file of the node; only for what lies in its root file system."""
        return (self.root / path.lstrip("/")).read_text()

    # --- systemd --------------------------------------------------------------

    def systemctl(self, *words: str, check: bool = True, limit_s: float = RUN_LIMIT_S) -> str:
        """`systemctl WORDS`; its output."""
        return self.run("systemctl", *words, check=check, limit_s=limit_s).stdout

    def property(self, name: str, unit: str = "meshbpf.service") -> str:
        """A property of a unit, as `systemctl show` has it."""
        return self.systemctl("show", "--value", f"--property={name}", unit).strip()

    def journal(self, unit: str = "meshbpf.service") -> str:
        """All that a unit has logged since the boot."""
        return self.run("journalctl", "--no-pager", "-o", "short-monotonic", "-u", unit).stdout

    def _make_cgroups(self) -> list[Path]:
        groups = [hierarchy / self.name for hierarchy in _hierarchies()]
        for group in groups:
            group.mkdir()
        return groups


def sweep() -> None:
    """Remove what nodes of dead processes have left."""
    for place in (CACHE, *_hierarchies()):
        for left in place.glob(f"{PREFIX}*-*"):
            name = left.name.removesuffix(".console")
            owner = name.rpartition("-")[2]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                _remove(CACHE / name)
                (CACHE / f"{name}.console").unlink(missing_ok=True)


def _hierarchies() -> list[Path]:
    """Roots of the cgroup trees that systemd-nspawn uses: v2, and v1's named one."""
    places = [Path("/sys/fs/cgroup", name) for name in ("unified", "systemd", "")]
    return [place for place in places if (place / "cgroup.procs").exists()]


def _remove(work: Path) -> None:
    """Unmount and remove a node's folders and cgroups."""
    root = work / "root"
    if root.is_mount():
        subprocess.run(["umount", "--lazy", root], check=True)
    if work.exists():
        shutil.rmtree(work)
    for hierarchy in _hierarchies():
        top = hierarchy / work.name
        if not top.is_dir():
            continue
        deadline = time.monotonic() + 5.0
        for group in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
            _rmdir(group, deadline)
        _rmdir(top, deadline)


def _rmdir(group: Path, deadline: float) -> None:
    """A cgroup is busy for a moment after its last process has ended."""
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
