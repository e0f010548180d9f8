"""One node's container runtime: a containerd of our own, in the node's namespace.

It shares nothing with one that the machine may run: root, state, socket, CNI
configuration and addresses lie in the testbed's directory, its bridge in the
node's network namespace, its pods' cgroups below one of ours. Asked by CRI
through meshbpf's own gRPC client.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from meshbpf.agent.runtime.grpc_client import open_channel
from meshbpf.agent.wire import cri
from meshbpf.agent.wire.grpc import GrpcError
from meshbpf.agent.wire.pb import cri_pb2
from tests.containerd.image import IMAGE
from tests.progs.program import BedError, Program, eventually

NAMESPACE = "demo"
PORT = 8080
CALL_LIMIT_S = 30.0
START_LIMIT_S = 20.0

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Made:
    """A pod that the runtime made."""

    name: str
    node: int
    sandbox: str
    uid: str
    netns: str
    """Name below /run/netns; empty for a host-network pod."""
    ip: str
    pid: int

    @property
    def key(self) -> str:
        return f"{NAMESPACE}/{self.name}"


class Containerd:
    """Starts, stops and kills a containerd, and makes pods in it."""

    def __init__(self, directory: Path, tag: str, node: int) -> None:
        self.directory = directory / f"cri{node}"
        self.tag, self.node = tag, node
        self.netns = f"{tag}-node{node}"
        self.socket = self.directory / "s"  # short: a unix address has 108 bytes
        self.subnet = f"198.18.{63 + node}.0/24"
        self.cgroup = f"meshbpf-{tag}-{node}"
        self._serial = 0
        self._program: Program | None = None

    # --- life ---------------------------------------------------------------

    def start(self) -> None:
        """Run it; returns when it answers CRI."""
        self._configure()
        argv = ["containerd", "--config", str(self.directory / "config.toml")]
        self._program = Program(self.directory.parent, f"containerd{self.node}", self.netns, argv)

        def answers() -> bool:
            assert self._program is not None
            if not self._program.running:
                raise BedError(f"containerd ended:\n{self._program.tail()}")
            with contextlib.suppress(OSError, GrpcError):
                self.call("Version", cri_pb2.VersionRequest(), cri_pb2.VersionResponse)
                return True
            return False

        eventually("containerd answers", answers, START_LIMIT_S)

    def load_image(self, archive: Path) -> None:
        argv = ["ctr", "-a", str(self.socket), "-n", "k8s.io", "images", "import", str(archive)]
        subprocess.run(argv, check=True, capture_output=True, timeout=CALL_LIMIT_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop or kill the daemon alone: its pods run on."""
        if self._program is not None:
            self._program.end(number)
            self._program = None

    def close(self) -> None:
        """Remove every pod, as far as the runtime is there to do it, then stop it."""
        if self._program is not None and self._program.running:
            with contextlib.suppress(OSError, GrpcError):
                for item in self.list():
                    self.remove(item.id)
        self.end()

    def sweep(self) -> None:
        """Remove what is left when nobody was there to do it in order."""
        for pid in _processes_naming(f"{self.socket}"):
            os.kill(pid, signal.SIGKILL)
        for group in self._cgroups():
            for folder in sorted(group.rglob("*"), reverse=True):
                if folder.is_dir():
                    _empty(folder)
            _empty(group)
        for where in reversed(_mounts_below(self.directory)):
            subprocess.run(["umount", "--lazy", where], check=True)
        for record in self.directory.glob("netns/*"):
            path = Path("/run/netns") / record.name
            if path.exists():
                subprocess.run(["ip", "netns", "delete", record.name], check=True)

    def left(self) -> list[str]:
        """Whatever of it is still there, in words."""
        found = [f"process {pid}" for pid in _processes_naming(f"{self.socket}")]
        found += [f"cgroup {path}" for path in self._cgroups()]
        found += [f"mount {path}" for path in _mounts_below(self.directory)]
        for record in self.directory.glob("netns/*"):
            if (Path("/run/netns") / record.name).exists():
                found.append(f"namespace {record.name}")
        return found

    def _cgroups(self) -> list[Path]:
        root = Path("/sys/fs/cgroup")
        return [*root.glob(self.cgroup), *root.glob(f"*/{self.cgroup}")]

    # --- pods ---------------------------------------------------------------

    def run_pod(
        self,
        name: str,
        *,
        attempt: int = 0,
        host_network: bool = False,
        serve: bool = True,
        args: Sequence[str] = (),
    ) -> Made:
        """A pod as the kubelet makes it: labels, uid, cgroup; and a server in it, or `args`."""
        self._serial += 1
        uid = f"{self.tag}{self.node}-{self._serial}"
        mode = cri_pb2.NODE if host_network else cri_pb2.POD
        config = cri_pb2.PodSandboxConfig(
            metadata=cri_pb2.PodSandboxMetadata(
                name=name, uid=uid, namespace=NAMESPACE, attempt=attempt
            ),
            hostname="" if host_network else name,
            log_directory=str(self.directory / "logs"),
            labels={cri.POD_NAMESPACE_LABEL: NAMESPACE, cri.POD_NAME_LABEL: name},
            linux=cri_pb2.LinuxPodSandboxConfig(
                cgroup_parent=f"/{self.cgroup}/pod{uid}",
                security_context=cri_pb2.LinuxSandboxSecurityContext(
                    namespace_options=cri_pb2.NamespaceOption(network=mode)
                ),
            ),
        )
        answer = self.call(
            "RunPodSandbox",
            cri_pb2.RunPodSandboxRequest(config=config),
            cri_pb2.RunPodSandboxResponse,
        )
        sandbox = answer.pod_sandbox_id
        if serve:
            self._start_app(sandbox, config, args or ("serve", str(PORT), name))
        status = self._status(sandbox)
        info = json.loads(status.info["info"])
        namespaces = info["runtimeSpec"]["linux"]["namespaces"]
        path = next((n.get("path", "") for n in namespaces if n["type"] == "network"), "")
        netns = Path(path).name if path and not host_network else ""
        if netns:
            (self.directory / "netns" / netns).touch()
        ip = status.status.network.ip
        return Made(name, self.node, sandbox, uid, netns, ip, info["pid"])

    def _start_app(
        self, sandbox: str, config: cri_pb2.PodSandboxConfig, args: Sequence[str]
    ) -> None:
        container = cri_pb2.ContainerConfig(
            metadata=cri_pb2.ContainerMetadata(name="app"),
            image=cri_pb2.ImageSpec(image=IMAGE),
            command=["/app"],
            args=args,
            log_path=f"{config.metadata.name}.log",
        )
        made = self.call(
            "CreateContainer",
            cri_pb2.CreateContainerRequest(
                pod_sandbox_id=sandbox, config=container, sandbox_config=config
            ),
            cri_pb2.CreateContainerResponse,
        )
        self.call(
            "StartContainer",
            cri_pb2.StartContainerRequest(container_id=made.container_id),
            cri_pb2.StartContainerResponse,
        )

    def kill_pod(self, pod: Made) -> None:
        """Kill its first process, as the OOM killer would; the sandbox stays listed, NotReady."""
        os.kill(pod.pid, signal.SIGKILL)
        eventually("the runtime has noticed", lambda: not self.ready(pod.sandbox), 10.0)

    def stop_pod(self, sandbox: str) -> None:
        """Stop it in order; the sandbox stays listed, NotReady."""
        request = cri_pb2.StopPodSandboxRequest(pod_sandbox_id=sandbox)
        self.call("StopPodSandbox", request, cri_pb2.StopPodSandboxResponse)

    def remove(self, sandbox: str) -> None:
        """Stop it and remove every trace of it from the runtime."""
        self.stop_pod(sandbox)
        request = cri_pb2.RemovePodSandboxRequest(pod_sandbox_id=sandbox)
        self.call("RemovePodSandbox", request, cri_pb2.RemovePodSandboxResponse)

    def list(self) -> list[cri_pb2.PodSandbox]:
        request = cri_pb2.ListPodSandboxRequest()
        return list(self.call("ListPodSandbox", request, cri_pb2.ListPodSandboxResponse).items)

    def ready(self, sandbox: str) -> bool:
        return self._status(sandbox).status.state == cri_pb2.SANDBOX_READY

    def _status(self, sandbox: str) -> cri_pb2.PodSandboxStatusResponse:
        request = cri_pb2.PodSandboxStatusRequest(pod_sandbox_id=sandbox, verbose=True)
        return self.call("PodSandboxStatus", request, cri_pb2.PodSandboxStatusResponse)

    def call(self, method: str, request: Any, kind: type[A]) -> A:
        """One CRI call on a connection of its own."""

        async def ask() -> bytes:
            stream = await trio.open_unix_socket(str(self.socket))
            async with open_channel(stream, "localhost") as channel:
                return await channel.unary(
                    f"runtime.v1.RuntimeService/{method}",
                    request.SerializeToString(),
                    timeout_s=CALL_LIMIT_S,
                )

        answer: A = kind.FromString(trio.run(ask))  # type: ignore[attr-defined]
        return answer

    # --- files --------------------------------------------------------------

    def _configure(self) -> None:
        for name in ("root", "state", "net.d", "netns", "logs", "cni"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        here = self.directory
        for plugin in Path("/usr/lib/cni").iterdir():
            # Links, so that a test may put one more beside them.
            with contextlib.suppress(FileExistsError):
                (here / "cni" / plugin.name).symlink_to(plugin)
        (here / "config.toml").write_text(f"""\
version = 2
root = "{here}/root"
state = "{here}/state"
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  # Where CAP_SYS_RESOURCE is missing a sandbox's oom_score_adj of -998 cannot be set.
  restrict_oom_score_adj = true
  sandbox_image = "{IMAGE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{here}/cni"
    conf_dir = "{here}/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
""")
        network = {
            "cniVersion": "0.4.0",
            "name": f"{self.tag}{self.node}",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "pods",
                    "isGateway": True,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": f"{here}/ipam",
                        "ranges": [[{"subnet": self.subnet}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        path = here / "net.d" / "10-pods.conflist"
        if not path.exists():  # a runtime that is restarted finds what was there
            path.write_text(json.dumps(network))


def _processes_naming(text: str) -> list[int]:
    """Processes with `text` as one of their arguments: containerd's shims name its socket."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text in path.read_text(errors="replace").split("\0"):
                found.append(int(path.parent.name))
    return found


def _empty(group: Path) -> None:
    """Kill what runs in a cgroup that we made, and remove it."""
    deadline = time.monotonic() + 5.0
    while group.exists():
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [
        where for where in (line.split()[1] for line in lines) if where.startswith(f"{directory}/")
    ]
