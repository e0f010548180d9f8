"""A real kube-apiserver with etcd, on loopback, for as long as a test needs it.

The binaries are named by K8S_BIN (a folder with kube-apiserver and kubectl);
etcd is looked for there and on PATH.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.progs.program import BedError

START_LIMIT_S = 120.0
TOKEN = "meshbpf-test-admin-token"
READER = "meshbpf-test-agent-token"
CRDS = {
    "networking.istio.io": {
        "ServiceEntry": "serviceentries",
        "WorkloadEntry": "workloadentries",
    },
    "security.istio.io": {
        "AuthorizationPolicy": "authorizationpolicies",
        "PeerAuthentication": "peerauthentications",
    },
}


def missing() -> str:
    """Why there can be none here; empty when there can."""
    folder = os.environ.get("K8S_BIN", "")
    if not folder:
        return "K8S_BIN names no folder with kube-apiserver and kubectl"
    for name in ("kube-apiserver", "kubectl"):
        if not (Path(folder) / name).exists():
            return f"{folder} has no {name}"
    if etcd() is None:
        return "etcd is neither in K8S_BIN nor on PATH"
    return ""


def etcd() -> str | None:
    beside = Path(os.environ.get("K8S_BIN", "")) / "etcd"
    return str(beside) if beside.exists() else shutil.which("etcd")


def crd(
    group: str, kind: str, plural: str, version: str = "v1", *, status: bool = False
) -> dict[str, Any]:
    """As much of Istio's CRD as the API server needs to keep such objects."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {
        "name": version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}} if status else {},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        # Without it no group of Kubernetes' own may be added to.
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {
                "api-approved.kubernetes.io": "https://github.com/kubernetes/enhancements"
            },
        },
        "spec": {
            "group": group,
            "scope": "Cluster" if kind == "GatewayClass" else "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [served],
        },
    }


class KubeApiServer:
    """One cluster's control plane, as far as it is an API."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self._etcd_port, self._peer_port = free_ports(3)
        self.kubeconfig = folder / "kubeconfig"
        self.agent_kubeconfig = folder / "agent-kubeconfig"
        self._bin = Path(os.environ["K8S_BIN"])
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        folder = self.folder
        for name in ("pki", "etcd"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        key = folder / "pki" / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, stderr=-3)
        pub = folder / "pki" / "sa.pub"
        argv = ["openssl", "rsa", "-in", str(key), "-pubout", "-out", str(pub)]
        subprocess.run(argv, check=True, stderr=-3)
        tokens = f'{TOKEN},admin,1,"system:masters"\n{READER},agent,2,"meshbpf"\n'
        (folder / "tokens.csv").write_text(tokens)
        self._start_etcd()
        self.start_server()

    def _start_etcd(self) -> None:
        url, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{self._peer_port}"
        command = etcd()
        assert command is not None
        self._run(
            "etcd",
            [
                command,
                *("--name", "e", "--data-dir", str(self.folder / "etcd")),
                *("--listen-client-urls", url, "--advertise-client-urls", url),
                *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"e={peer}"),
            ],
        )

    def start_server(self) -> None:
        folder, pki = self.folder, self.folder / "pki"
        self._run(
            "kube-apiserver",
            [
                str(self._bin / "kube-apiserver"),
                f"--etcd-servers=http://127.0.0.1:{self._etcd_port}",
                "--bind-address=127.0.0.1",
                f"--secure-port={self.port}",
                "--advertise-address=127.0.0.1",
                "--endpoint-reconciler-type=none",
                "--service-cluster-ip-range=198.19.0.0/20,fd00:6d62:f0::/112",
                "--authorization-mode=RBAC",
                "--anonymous-auth=false",
                f"--cert-dir={pki}",
                f"--token-auth-file={folder / 'tokens.csv'}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--service-account-key-file={pki / 'sa.pub'}",
                f"--service-account-signing-key-file={pki / 'sa.key'}",
                "--disable-admission-plugins=ServiceAccount",
            ],
        )
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if (pki / "apiserver.crt").exists():
                self._write(self.kubeconfig, TOKEN)
                self._write(self.agent_kubeconfig, READER)
                if self.kubectl("get", "--raw", "/readyz", check=False).returncode == 0:
                    return
            if time.monotonic() > deadline or self._running[-1].poll() is not None:
                log = (folder / "kube-apiserver.log").read_text()[-2000:]
                raise BedError(f"kube-apiserver does not answer:\n{log}")
            time.sleep(0.2)

    def stop_server(self) -> None:
        """The API server alone: etcd keeps the objects."""
        _end(self._running.pop())

    def close(self) -> None:
        for process in reversed(self._running):
            _end(process)
        self._running.clear()

    def kubectl(
        self, *argv: str, text: str = "", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        whole = [str(self._bin / "kubectl"), "--kubeconfig", str(self.kubeconfig), *argv]
        done = subprocess.run(whole, input=text, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise BedError(f"kubectl {' '.join(argv)}: {done.stderr}")
        return done

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change them; a status goes its own way, as the kubelet's does."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", text=json.dumps(listed))
        for each in objects:
            if "status" in each and each["kind"] == "Pod":
                self.patch_status(each["metadata"]["name"], each["metadata"]["namespace"], each)

    def add_kind(
        self, group: str, kind: str, plural: str, version: str = "v1", *, status: bool = False
    ) -> None:
        """Have it keep such objects, from now on; `status`: that is written by itself."""
        self.apply(crd(group, kind, plural, version, status=status))
        self.kubectl("wait", "--for=condition=Established", f"crd/{plural}.{group}")

    def grant(self, name: str, rules: list[dict[str, Any]]) -> None:
        """Give the user of `agent_kubeconfig` these rights too."""
        group, meta = "rbac.authorization.k8s.io", {"name": name}
        version = f"{group}/v1"
        self.apply(
            {"apiVersion": version, "kind": "ClusterRole", "metadata": meta, "rules": rules},
            {
                "apiVersion": version,
                "kind": "ClusterRoleBinding",
                "metadata": meta,
                "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": name},
                "subjects": [{"apiGroup": group, "kind": "Group", "name": "meshbpf"}],
            },
        )

    def patch_status(self, name: str, namespace: str, body: dict[str, Any]) -> None:
        change = json.dumps({"status": body["status"]})
        argv = ("patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge")
        self.kubectl(*argv, "-p", change)

    def annotations(self, namespace: str, name: str) -> dict[str, str]:
        text = self.kubectl("get", "pod", name, "-n", namespace, "-o", "json").stdout
        found: dict[str, str] = json.loads(text)["metadata"].get("annotations", {})
        return found

    def _run(self, name: str, argv: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running.append(subprocess.Popen(argv, stdout=log, stderr=log, stdin=-3))

    def _write(self, path: Path, token: str) -> None:
        # The certificate that it made for itself is its own CA.
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.folder / "pki" / "apiserver.crt"),
        }
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": token}}],
        }
        path.write_text(json.dumps(text))


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[KubeApiServer]:
    server = KubeApiServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports
