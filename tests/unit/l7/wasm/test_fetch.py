"""A plugin's code from a URL and from a registry, with every digest looked at."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from typing import Any

import pytest

from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.l7.filter import Call, CallAnswer, CallFailed
from meshbpf.agent.l7.message import Headers, ResponseHead
from meshbpf.agent.l7.wasm.fetch import FetchError, fetch_module, registry_authorization
from meshbpf.agent.l7.wasm.plugin import ModuleSource
from tests.unit.l7.samples import an_object

CODE = b"\0asm\1\0\0\0"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def answer(body: bytes = b"", status: int = 200, **headers: str) -> CallAnswer:
    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return CallAnswer(ResponseHead(status, Headers(raw)), body)


class Web:
    """Answers by URL; remembers what was asked."""

    def __init__(self, pages: dict[str, Any]) -> None:
        self.pages = pages
        self.asked: list[tuple[str, str | None]] = []

    def get(self, source: ModuleSource, authorization: str = "") -> bytes:
        steps = fetch_module(source, authorization)
        call = next(steps)
        while True:
            assert isinstance(call, Call)
            assert call.guarded
            url = f"{call.head.scheme}://{call.head.authority}{call.head.path}"
            given = call.head.headers.get("authorization")
            self.asked.append((url, given))
            page = self.pages.get(url, answer(status=404))
            try:
                call = steps.send(page(given) if callable(page) else page)
            except StopIteration as end:
                code: bytes = end.value
                return code


def layer(code: bytes = CODE, name: str = "./plugin.wasm") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(code)
        archive.addfile(member, io.BytesIO(code))
    return gzip.compress(packed.getvalue())


BASE = "https://reg.example:5000/v2/team/filter"
WASM = "application/vnd.module.wasm.content.layer.v1+wasm"
TAR = "application/vnd.oci.image.layer.v1.tar+gzip"


def image(blob: bytes = CODE, kind: str = WASM, tag: str = "v1") -> dict[str, Any]:
    layers = [{"mediaType": kind, "digest": f"sha256:{digest(blob)}"}]
    manifest = json.dumps({"layers": layers}).encode()
    return {
        f"{BASE}/manifests/{tag}": answer(manifest),
        f"{BASE}/manifests/sha256:{digest(manifest)}": answer(manifest),
        f"{BASE}/blobs/sha256:{digest(blob)}": answer(blob),
    }


OCI = ModuleSource("oci://reg.example:5000/team/filter:v1")


def test_from_a_url_with_its_sha256() -> None:
    web = Web({"https://files.example/p.wasm?v=1": answer(CODE)})
    url = "https://files.example/p.wasm?v=1"
    assert web.get(ModuleSource(url)) == CODE
    assert web.get(ModuleSource(url, digest(CODE))) == CODE
    with pytest.raises(FetchError, match="its sha256 is"):
        web.get(ModuleSource(url, "0" * 64))


def test_redirects_are_followed_but_not_to_a_metadata_service() -> None:
    pages = {
        "http://a.example/p": answer(status=302, location="/q"),
        "http://a.example/q": answer(status=307, location="http://169.254.169.254/secret"),
        "http://a.example/loop": answer(status=302, location="/loop"),
    }
    with pytest.raises(FetchError, match="metadata"):
        Web(pages).get(ModuleSource("http://a.example/p"))
    with pytest.raises(FetchError, match="redirects"):
        Web(pages).get(ModuleSource("http://a.example/loop"))


@pytest.mark.parametrize(("blob", "kind"), [(CODE, WASM), (layer(), TAR)])
def test_from_an_image_of_either_kind(blob: bytes, kind: str) -> None:
    assert Web(image(blob, kind)).get(OCI) == CODE


def test_an_image_is_what_its_digest_says() -> None:
    pages = image()
    manifest = digest(pages[f"{BASE}/manifests/v1"].body)
    assert Web(pages).get(ModuleSource(OCI.url, manifest)) == CODE
    by_digest = ModuleSource(f"oci://reg.example:5000/team/filter@sha256:{manifest}")
    assert Web(pages).get(by_digest) == CODE
    with pytest.raises(FetchError, match="its sha256 is"):
        Web(pages).get(ModuleSource(OCI.url, "0" * 64))
    with pytest.raises(FetchError, match="different images"):
        Web(pages).get(ModuleSource(by_digest.url, "0" * 64))


def test_a_blob_that_is_not_what_was_listed_is_refused() -> None:
    pages = image()
    pages[f"{BASE}/blobs/sha256:{digest(CODE)}"] = answer(b"other")
    with pytest.raises(FetchError, match="its sha256 is"):
        Web(pages).get(OCI)


def test_an_index_leads_to_its_first_image() -> None:
    pages = image(tag="inner")
    inner = digest(pages[f"{BASE}/manifests/inner"].body)
    index = json.dumps({"manifests": [{"digest": f"sha256:{inner}"}]}).encode()
    pages[f"{BASE}/manifests/v1"] = answer(index)
    assert Web(pages).get(OCI) == CODE


def test_a_registrys_token_is_fetched_with_the_secret_and_used() -> None:
    challenge = 'Bearer realm="https://auth.example/t",service="reg",scope="repository:x:pull"'
    pages = image()

    def guarded(page: CallAnswer) -> Any:
        refused = answer(status=401, www_authenticate=challenge)
        return lambda given: page if given == "Bearer t1" else refused

    locked = {url: guarded(page) for url, page in pages.items()}
    token_url = "https://auth.example/t?service=reg&scope=repository%3Ax%3Apull"
    locked[token_url] = lambda given: answer(b'{"token": "t1"}') if given == "Basic dTpw" else None
    web = Web(locked)
    assert web.get(OCI, "Basic dTpw") == CODE
    assert web.asked[1] == (token_url, "Basic dTpw")
    assert web.asked[-1][1] == "Bearer t1"


def test_credentials_do_not_follow_a_redirect_to_another_host() -> None:
    pages = image()
    blob = f"{BASE}/blobs/sha256:{digest(CODE)}"
    pages[blob] = answer(status=307, location="https://cdn.example/blob")
    pages["https://cdn.example/blob"] = answer(CODE)
    web = Web(pages)
    assert web.get(OCI, "Basic dTpw") == CODE
    assert web.asked[-1] == ("https://cdn.example/blob", None)


def test_the_pull_secret_is_read_for_its_registry() -> None:
    config = {"auths": {"reg.example:5000": {"auth": "dTpw"}}}
    data = {".dockerconfigjson": base64.b64encode(json.dumps(config).encode()).decode()}
    secret = an_object("", "Secret", "pull", None, data=data)
    objects = ObjectSet.of([secret])
    named = ModuleSource(OCI.url, pull_secret="shop/pull")
    assert registry_authorization(objects, named) == "Basic dTpw"
    assert registry_authorization(objects, OCI) == ""
    elsewhere = ModuleSource("oci://other.example/x", pull_secret="shop/pull")
    assert registry_authorization(objects, elsewhere) == ""


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (answer(status=404), "answered 404"),
        (CallFailed("refused"), "refused"),
        (answer(b"<html>"), "not JSON"),
        (answer(b'{"layers": []}'), "no layers"),
        (answer(b'{"layers": [{"digest": "md5:x"}]}'), "not a digest"),
        (answer(status=401), "imagePullSecret"),
    ],
)
def test_what_goes_wrong_is_told(page: Any, why: str) -> None:
    with pytest.raises(FetchError, match=why):
        Web({f"{BASE}/manifests/v1": page}).get(OCI)


def test_an_image_without_a_plugin_is_told() -> None:
    with pytest.raises(FetchError, match=r"no layer holds a Wasm module or plugin\.wasm"):
        Web(image(layer(name="other.wasm"), TAR)).get(OCI)


def test_a_layer_that_unpacks_to_anything_is_refused() -> None:
    bomb = gzip.compress(bytes(65 * 1024 * 1024))
    with pytest.raises(FetchError, match="longer than"):
        Web(image(bomb, TAR)).get(OCI)
