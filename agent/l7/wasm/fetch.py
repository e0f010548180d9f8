"""Where a plugin's code comes from: a URL, or a registry of OCI images. Steps without I/O.

A registry's image holds the code as a layer of its own
(`application/vnd.module.wasm.content.layer.v1+wasm`), or as the file
`plugin.wasm` of an ordinary layer; Istio reads both, and so do we. Digests
are checked where there are any: those of the blobs always, that of the image
(or of the file behind a URL) when the object names it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.l7.authn.uris import UriError, read_uri
from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.wasm.plugin import ModuleSource

MAX_MODULE_BYTES = 64 * 1024 * 1024
_MAX_MANIFEST_BYTES = 1024 * 1024
_TIMEOUT_S = 30.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_IN_TAR = "plugin.wasm"
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_REFERENCE = re.compile(
    r"(?P<host>[^/]+)/(?P<name>[a-z0-9._/-]+?)(?::(?P<tag>[\w][\w.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)

Fetching = Generator[Call, CallAnswer | CallFailed, bytes]


class FetchError(Exception):
    """Why the code could not be had."""


def fetch_module(source: ModuleSource, authorization: str = "") -> Fetching:
    """The code. `authorization` is a header's value for the registry; not for `file:`."""
    if source.url.startswith("oci://"):
        return _from_registry(source, authorization)
    return _from_url(source)


def check_sha256(data: bytes, wanted: str) -> None:
    """FetchError when `wanted` names other bytes."""
    found = hashlib.sha256(data).hexdigest()
    if wanted and found != wanted:
        raise FetchError(f"its sha256 is {found}, not {wanted}")


def registry_authorization(objects: ObjectSet, source: ModuleSource) -> str:
    """What the pull secret says for the registry; empty without one."""
    namespace, _, name = source.pull_secret.partition("/")
    secret = objects.get("", "Secret", namespace, name) if name else None
    data = (secret.body.get("data") or {}) if secret is not None else {}
    try:
        config = json.loads(base64.b64decode(data.get(".dockerconfigjson", "")))
        entry = config["auths"][urlsplit(source.url).netloc]
        auth = (
            entry.get("auth")
            or base64.b64encode(f"{entry['username']}:{entry['password']}".encode()).decode()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f"Basic {auth}"


# --- steps


def _from_url(source: ModuleSource) -> Fetching:
    answer = yield from _get(source.url, {}, MAX_MODULE_BYTES)
    _must_be_200(source.url, answer)
    check_sha256(answer.body, source.sha256)
    return answer.body


def _from_registry(source: ModuleSource, authorization: str) -> Fetching:
    found = _REFERENCE.fullmatch(source.url.removeprefix("oci://"))
    if found is None:
        raise FetchError("is not HOST/NAME[:TAG][@DIGEST]")
    host = found["host"] if found["host"] != "docker.io" else "registry-1.docker.io"
    base = f"https://{host}/v2/{found['name']}"
    headers = {"accept": ", ".join(_MANIFESTS)}
    wanted = (found["digest"] or "").removeprefix("sha256:") or source.sha256
    if source.sha256 and wanted != source.sha256:
        raise FetchError("its URL and its sha256 name different images")
    reference = found["digest"] or found["tag"] or "latest"
    manifest, token = yield from _manifest(f"{base}/manifests/{reference}", headers, authorization)
    check_sha256(manifest, wanted)
    document = _json(manifest)
    if "manifests" in document:
        digest = _digest(_items(document, "manifests"))
        url = f"{base}/manifests/sha256:{digest}"
        manifest, token = yield from _manifest(url, headers, token)
        check_sha256(manifest, digest)
        document = _json(manifest)
    layers = _items(document, "layers")
    # The last one that may hold it: a file of an upper layer hides those below.
    for layer in reversed(layers):
        digest, kind = _digest([layer]), str(layer.get("mediaType", ""))
        fields = {"authorization": token} if token else {}
        answer = yield from _get(f"{base}/blobs/sha256:{digest}", fields, MAX_MODULE_BYTES)
        _must_be_200("the layer", answer)
        check_sha256(answer.body, digest)
        code = answer.body if "wasm" in kind else _out_of_tar(answer.body)
        if code is not None:
            return code
    raise FetchError(f"no layer holds a Wasm module or {_IN_TAR}")


def _manifest(
    url: str, headers: Mapping[str, str], authorization: str
) -> Generator[Call, CallAnswer | CallFailed, tuple[bytes, str]]:
    """The manifest, and the authorization that got it."""
    fields = {**headers, "authorization": authorization} if authorization else dict(headers)
    answer = yield from _get(url, fields, _MAX_MANIFEST_BYTES)
    if answer.head.status == 401:
        authorization = yield from _token(answer, authorization)
        answer = yield from _get(
            url, {**headers, "authorization": authorization}, _MAX_MANIFEST_BYTES
        )
    _must_be_200("the manifest", answer)
    return answer.body, authorization


def _token(
    refused: CallAnswer, authorization: str
) -> Generator[Call, CallAnswer | CallFailed, str]:
    """A bearer token, as the registry's challenge says (distribution.github.io, token auth)."""
    challenge = refused.head.headers.get("www-authenticate") or ""
    if not challenge.lower().startswith("bearer "):
        raise FetchError("the registry wants credentials: name an imagePullSecret")
    parts = dict(_CHALLENGE.findall(challenge))
    query = {name: parts[name] for name in ("service", "scope") if name in parts}
    url = f"{parts.get('realm', '')}?{urlencode(query)}"
    fields = {"authorization": authorization} if authorization.startswith("Basic ") else {}
    answer = yield from _get(url, fields, _MAX_MANIFEST_BYTES)
    _must_be_200("the registry's token", answer)
    document = _json(answer.body)
    token = document.get("token") or document.get("access_token")
    if not isinstance(token, str):
        raise FetchError("the registry's token service gave none")
    return f"Bearer {token}"


def _get(
    url: str, headers: Mapping[str, str], limit_bytes: int
) -> Generator[Call, CallAnswer | CallFailed, CallAnswer]:
    for _ in range(_MAX_REDIRECTS):
        try:
            target, path, tls = read_uri(url)
        except UriError as refused:
            raise FetchError(f"{url} {refused}") from None
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        host = urlsplit(url).netloc
        head = RequestHead("GET", path, host, Headers(raw), "https" if tls else "http")
        call = Call(
            target, head, timeout_s=_TIMEOUT_S, tls=tls, limit_bytes=limit_bytes, guarded=True
        )
        answer = yield call
        if isinstance(answer, CallFailed):
            raise FetchError(answer.reason)
        location = answer.head.headers.get("location")
        if answer.head.status not in _REDIRECTS or not location:
            return answer
        url = urljoin(url, location)
        if urlsplit(url).netloc != host:
            # Credentials are for whom they were given to.
            headers = {name: v for name, v in headers.items() if name != "authorization"}
    raise FetchError(f"more than {_MAX_REDIRECTS} redirects")


def _must_be_200(what: str, answer: CallAnswer) -> None:
    if answer.head.status != 200:
        raise FetchError(f"{what}: answered {answer.head.status}")


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FetchError("the registry's answer is not JSON")
    return found


def _items(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = document.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(x, dict) for x in found):
        raise FetchError(f"the image has no {name}")
    return found


def _digest(descriptors: Sequence[Mapping[str, Any]]) -> str:
    digest = str(descriptors[0].get("digest", ""))
    if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) is None:
        raise FetchError(f"{digest!r} is not a digest of sha256")
    return digest.removeprefix("sha256:")


def _out_of_tar(layer: bytes) -> bytes | None:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(layer)) as packed:
            # Bounded before it is looked at: a small layer may unpack to anything.
            plain = packed.read(MAX_MODULE_BYTES + 1) if layer[:2] == b"\x1f\x8b" else layer
        if len(plain) > MAX_MODULE_BYTES:
            raise FetchError(f"a layer is longer than {MAX_MODULE_BYTES} bytes")
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            for member in archive:
                if member.isfile() and member.name.lstrip("./") == _IN_TAR:
                    inner = archive.extractfile(member)
                    return inner.read() if inner is not None else None
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        return None
    return None
