"""Istio's proxy configuration: the keys that mean the same, in their order, each with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf.agent.config_mesh import metadata
from meshbpf.agent.config_sources import resolve
from meshbpf.agent.core.errors import ConfigError

pytestmark = pytest.mark.compat

MESH = """
trustDomain: cluster.local
defaultConfig:
  discoveryAddress: of-the-mesh:15012
  statsPort: 9000
  tracing: {sampling: 1}
  proxyMetadata:
    ISTIO_META_ONE: mesh
    TWO: mesh
"""


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mesh_file(directory: Path, text: str = MESH) -> None:
    (directory / "etc/istio/config").mkdir(parents=True)
    (directory / "etc/istio/config/mesh").write_text(text)


def test_proxy_config_is_read_with_the_line_of_each_value() -> None:
    text = "proxyAdminPort: 15999\nconcurrency: 2\ndiscoveryAddress: istiod.svc:15012\n"
    found = resolve({}, {"PROXY_CONFIG": text}).values
    assert (found["admin-port"].value, found["admin-port"].origin) == (15999, "env PROXY_CONFIG:1")
    assert (found["xds"].value, found["xds"].origin) == (
        "https://istiod.svc:15012",
        "env PROXY_CONFIG:3",
    )
    assert found["stats-port"].origin == "default"


def test_a_variable_comes_first_then_proxy_config_the_file_and_the_mesh(directory: Path) -> None:
    mesh_file(directory)
    file = directory / "config.yaml"
    file.write_text("stats-port: 9100\nadmin-port: 9200\n")
    environ = {"PROXY_CONFIG": "{proxyAdminPort: 9300, discoveryAddress: of-the-variable:1}"}
    found = resolve({}, environ, file).values
    assert (found["admin-port"].value, found["stats-port"].value) == (9300, 9100)
    assert found["xds"].value == "https://of-the-variable:1"
    found = resolve({}, {"XDS_ADDRESS": "first:1"} | environ, file).values
    assert found["xds"].value == "https://first:1"
    found = resolve({}, {}, file).values
    assert found["xds"].value == "https://of-the-mesh:15012"
    assert found["xds"].origin == "etc/istio/config/mesh:4"


def test_metadata_is_told_to_istiod_and_a_variable_outweighs_it(directory: Path) -> None:
    mesh_file(directory)
    environ = {
        "PROXY_CONFIG": "proxyMetadata: {TWO: variable, THREE: variable}",
        "ISTIO_META_THREE": "own",
    }
    found = metadata(environ)
    assert (found["ISTIO_META_ONE"], found["ISTIO_META_TWO"], found["ISTIO_META_THREE"]) == (
        "mesh",
        "variable",
        "own",
    )


@pytest.mark.parametrize("text", ["statsPort: many", "proxyAdminPort: 1.5"])
def test_a_wrong_value_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(ConfigError, match="env PROXY_CONFIG:1: "):
        resolve({}, {"PROXY_CONFIG": text})


def test_what_is_no_yaml_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="env PROXY_CONFIG:"):
        resolve({}, {"PROXY_CONFIG": "{statsPort: 1"})
    mesh_file(directory, "defaultConfig: {statsPort: 1")
    with pytest.raises(ConfigError, match="etc/istio/config/mesh:"):
        resolve({}, {})
