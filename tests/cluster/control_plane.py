"""A real control plane as plain processes in one node of a testbed: etcd, kube-apiserver, istiod.

The binaries are others' and are named by whoever runs this: ISTIOD is
pilot-discovery, K8S_BIN a folder with kube-apiserver and kubectl; etcd is on
PATH. Istio's CRDs come from ISTIO_CRDS, by default from an Istio source tree
beside the folder that ISTIOD lies in; Gateway API's, likewise, from GATEWAY_CRDS.

No kubelet runs: Node and Pod objects are created through the API, and the
status of each Pod is patched to what a kubelet would report.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshbpf.agent.core import ca
from tests.progs.pod import node_address
from tests.progs.program import Program, eventually, run_inside
from tests.testbed import Testbed

API_PORT, ETCD_PORT, ISTIOD_PORT = 16443, 12379, 15012
SERVICES = "198.19.0.0/16"
NAME = "istiod.istio-system.svc"
AGENT_NAMESPACE, AGENT_ACCOUNT = "istio-system", "ztunnel"


def missing() -> str:
    """Why it cannot run here; empty when it can."""
    istiod, binaries = os.environ.get("ISTIOD"), os.environ.get("K8S_BIN")
    if not istiod or not binaries:
        return "name the binaries: make cluster-test ISTIOD=PATH K8S_BIN=DIR"
    wanted = [Path(istiod), Path(binaries) / "kube-apiserver", Path(binaries) / "kubectl"]
    wanted += [crds(), gateway_crds()]
    absent = [str(path) for path in wanted if not path.exists()]
    if shutil.which("etcd") is None:
        absent.append("etcd on PATH")
    return f"not there: {', '.join(absent)}" if absent else ""


def crds() -> Path:
    if given := os.environ.get("ISTIO_CRDS"):
        return Path(given)
    beside = Path(os.environ["ISTIOD"]).resolve().parent.parent / "istio"
    return beside / "manifests" / "charts" / "base" / "files" / "crd-all.gen.yaml"


def gateway_crds() -> Path:
    """Gateway API's, as Istio's own tests have them."""
    if given := os.environ.get("GATEWAY_CRDS"):
        return Path(given)
    beside = Path(os.environ["ISTIOD"]).resolve().parent.parent / "istio"
    return beside / "tests" / "integration" / "pilot" / "testdata" / "gateway-api-crd.yaml"


class ControlPlane:
    """The processes and their files, in node 1 of `bed`."""

    def __init__(self, bed: Testbed) -> None:
        self.bed, self.netns = bed, bed.node_netns(1)
        self.directory = bed.directory / "cluster"
        self.pki = self.directory / "pki"
        self.istio_ca = self.directory / "cacerts"
        self.kubeconfig = self.directory / "admin.kubeconfig"
        self._binaries = Path(os.environ["K8S_BIN"])
        self._roots: list[ca.CertificateAuthority] = []

    # -- Kubernetes

    def start_kubernetes(self) -> None:
        self.pki.mkdir(parents=True)
        _make_pki(self.pki)
        self._program(
            "etcd",
            *("etcd", "--data-dir", str(self.directory / "etcd"), "--unsafe-no-fsync"),
            *("--listen-client-urls", f"http://127.0.0.1:{ETCD_PORT}"),
            *("--advertise-client-urls", f"http://127.0.0.1:{ETCD_PORT}"),
            *("--listen-peer-urls", f"http://127.0.0.1:{ETCD_PORT + 1}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{ETCD_PORT + 1}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{ETCD_PORT + 1}"),
        )
        pki = self.pki
        self._program(
            "kube-apiserver",
            str(self._binaries / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{ETCD_PORT}",
            f"--secure-port={API_PORT}",
            "--bind-address=0.0.0.0",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--service-cluster-ip-range={SERVICES}",
            "--authorization-mode=Node,RBAC",
            f"--client-ca-file={pki / 'ca.pem'}",
            f"--tls-cert-file={pki / 'apiserver.pem'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--cert-dir={pki}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki / 'sa.pub'}",
            f"--service-account-signing-key-file={pki / 'sa.key'}",
        )
        user = {"client-certificate": str(pki / "admin.pem"), "client-key": str(pki / "admin.key")}
        self.kubeconfig.write_text(_kubeconfig(pki, "127.0.0.1", user))
        eventually("kube-apiserver is ready", self._api_is_ready, 120.0)
        for file in (crds(), gateway_crds()):
            self.kubectl("apply", "--server-side", "-f", str(file), limit_s=120.0)

    def _api_is_ready(self) -> bool:
        done = self.kubectl("get", "--raw", "/readyz", check=False)
        return done.returncode == 0

    def kubectl(
        self, *argv: str, check: bool = True, limit_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        command = [str(self._binaries / "kubectl"), f"--kubeconfig={self.kubeconfig}", *argv]
        return run_inside(self.netns, command, check=check, limit_s=limit_s)

    def apply(self, *objects: dict[str, Any]) -> None:
        """`kubectl apply` of these; the status of a Pod goes where a kubelet puts it."""
        file = self.directory / "objects.json"
        plain = [{key: one[key] for key in one if key != "status"} for one in objects]
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": plain}))
        self.kubectl("apply", "--server-side", "-f", str(file))
        for one in objects:
            if status := one.get("status"):
                meta = one["metadata"]
                self.kubectl(
                    *("patch", one["kind"].lower(), meta["name"], "-n", meta["namespace"]),
                    *("--subresource=status", "--type=merge"),
                    *("-p", json.dumps({"status": status})),
                )

    def token(self, node: int) -> Path:
        """A token of the agent's account, bound to its own Pod on that node."""
        return self.pod_token(AGENT_NAMESPACE, AGENT_ACCOUNT, agent_pod(node))

    def pod_token(self, namespace: str, account: str, pod: str) -> Path:
        """A token for istiod, as a projected volume of that Pod would hold it."""
        done = self.kubectl(
            *("-n", namespace, "create", "token", account, "--audience", "istio-ca"),
            *("--bound-object-kind", "Pod", "--bound-object-name", pod),
        )
        path = self.directory / f"token-{pod}"
        path.write_text(done.stdout)
        return path

    def account_kubeconfig(self, namespace: str, account: str) -> Path:
        """For a process that runs under this account, anywhere in the testbed."""
        done = self.kubectl("-n", namespace, "create", "token", account)
        path = self.directory / f"kubeconfig-{account}"
        user = {"token": done.stdout.strip()}
        path.write_text(_kubeconfig(self.pki, node_address(1, 4), user))
        return path

    # -- istiod

    @property
    def root_file(self) -> Path:
        """What would be mounted from the ConfigMap istio-ca-root-cert."""
        return self.directory / "root-cert.pem"

    def new_root(self) -> None:
        """A fresh CA for istiod's next start; the bundle holds all roots so far, newest first."""
        self._roots.insert(0, ca.create("cluster.local", datetime.now(UTC)))
        newest = self._roots[0]
        bundle = b"".join(root.roots_pem for root in self._roots)
        self.istio_ca.mkdir(exist_ok=True)
        for name, content in {
            "ca-cert.pem": newest.roots_pem,
            "ca-key.pem": newest.key_pem,
            "cert-chain.pem": newest.roots_pem,
            "root-cert.pem": bundle,
        }.items():
            (self.istio_ca / name).write_bytes(content)
        fresh = self.root_file.with_suffix(".new")
        fresh.write_bytes(bundle)
        fresh.replace(self.root_file)

    def start_istiod(self) -> None:
        mesh = self.directory / "mesh.yaml"
        mesh.write_text("trustDomain: cluster.local\nrootNamespace: istio-system\n")
        environment = {
            "POD_NAME": "istiod-1",
            "POD_NAMESPACE": "istio-system",
            "SERVICE_ACCOUNT": "istiod",
            "REVISION": "default",
            "CLUSTER_ID": "Kubernetes",
            "PILOT_ENABLE_AMBIENT": "true",
            "PILOT_CERT_PROVIDER": "istiod",
            "ENABLE_CA_SERVER": "true",
            "ISTIOD_CUSTOM_HOST": NAME,
            "CA_TRUSTED_NODE_ACCOUNTS": f"{AGENT_NAMESPACE}/{AGENT_ACCOUNT}",
            "ROOT_CA_DIR": str(self.istio_ca),
            "VALIDATION_WEBHOOK_CONFIG_NAME": "",
            "INJECTION_WEBHOOK_CONFIG_NAME": "",
        }
        self._program(
            "istiod",
            *("env", *(f"{name}={value}" for name, value in environment.items())),
            *(os.environ["ISTIOD"], "discovery", "--kubeconfig", str(self.kubeconfig)),
            *("--meshConfig", str(mesh), "--secureGRPCAddr", f"0.0.0.0:{ISTIOD_PORT}"),
            *("--httpAddr", "127.0.0.1:8080", "--httpsAddr", "127.0.0.1:15017"),
            *("--grpcAddr", "127.0.0.1:15010", "--monitoringAddr", "127.0.0.1:15014"),
        )

        def ready() -> bool:
            argv = ["curl", "-fsS", "-m", "2", "http://127.0.0.1:8080/ready"]
            return run_inside(self.netns, argv, check=False).returncode == 0

        eventually("istiod is ready", ready, 120.0)

    def stop_istiod(self) -> None:
        self.bed.servers.pop("istiod").end()

    def _program(self, name: str, *argv: str) -> None:
        self.bed.servers[name] = Program(self.directory, name, self.netns, argv)


def agent_pod(node: int) -> str:
    return f"ztunnel-node{node}"


def agent_objects() -> list[dict[str, Any]]:
    """The namespace, account and Pods that the agents themselves run as."""
    found: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": AGENT_NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": AGENT_ACCOUNT, "namespace": AGENT_NAMESPACE},
        },
    ]
    for node in (1, 2):
        address = node_address(node, 4)
        found.append(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": agent_pod(node), "namespace": AGENT_NAMESPACE},
                "spec": {
                    "nodeName": f"node{node}",
                    "serviceAccountName": AGENT_ACCOUNT,
                    "hostNetwork": True,
                    "containers": [{"name": "agent", "image": "registry.example/meshbpf:1"}],
                },
                "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
            }
        )
    return found


def _make_pki(directory: Path) -> None:
    root = _key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "testbed")])
    authority = _certificate(name, name, root, root, [x509.BasicConstraints(True, None)])
    _write(directory / "ca.pem", authority)
    for file, subject, sans in (
        ("apiserver", [(NameOID.COMMON_NAME, "kube-apiserver")], ["127.0.0.1", node_address(1, 4)]),
        (
            "admin",
            [(NameOID.ORGANIZATION_NAME, "system:masters"), (NameOID.COMMON_NAME, "admin")],
            [],
        ),
    ):
        key = _key()
        extensions: list[x509.ExtensionType] = [
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            )
        ]
        if sans:
            extensions.append(
                x509.SubjectAlternativeName(
                    [x509.IPAddress(ipaddress.ip_address(text)) for text in sans]
                )
            )
        attributes = [x509.NameAttribute(oid, text) for oid, text in subject]
        made = _certificate(x509.Name(attributes), name, key, root, extensions)
        _write(directory / f"{file}.pem", made)
        (directory / f"{file}.key").write_bytes(_private(key))
    accounts = _key()
    (directory / "sa.key").write_bytes(_private(accounts))
    (directory / "sa.pub").write_bytes(
        accounts.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extensions: list[Any],
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=7))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _write(path: Path, certificate: x509.Certificate) -> None:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _kubeconfig(pki: Path, host: str, user: dict[str, str]) -> str:
    cluster = {
        "server": f"https://{host}:{API_PORT}",
        "certificate-authority": str(pki / "ca.pem"),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "testbed", "cluster": cluster}],
            "users": [{"name": "admin", "user": user}],
            "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": "admin"}}],
            "current-context": "testbed",
        }
    )
