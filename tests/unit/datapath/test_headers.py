"""Kernel headers are searched in one order, and a split tree becomes a whole one."""

from __future__ import annotations

import platform
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meshbpf.agent.datapath.headers import HeadersError, find_headers, locate_headers

ARCH = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
RELEASE = "6.1.0-9-test"

COMMON = ("include/uapi/linux/bpf.h", "include/linux/kconfig.h", f"arch/{ARCH}/include/asm/page.h")
BUILT = ("include/generated/autoconf.h", f"arch/{ARCH}/include/generated/asm/x.h")


def lay(folder: Path, *names: str, text: str = "") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text or name)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "usr/src").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    return tmp_path


def debian(root: Path, version: str) -> Path:
    """linux-headers-VERSION-ARCH over -common; returns the architecture's."""
    lay(root / f"usr/src/linux-headers-{version}-common", *COMMON, text=version)
    return lay(root / f"usr/src/linux-headers-{version}-{DEBIAN}", *BUILT, text=version)


def test_a_whole_tree_of_the_running_kernel_is_taken_as_it_is(root: Path) -> None:
    build = lay(root / "lib/modules" / RELEASE / "build", *COMMON, *BUILT)
    debian(root, "6.9.0-1")
    found = find_headers(root / "cache", root=root, release=RELEASE)
    assert found.path == build.resolve()
    assert not list((root / "cache").iterdir())


def test_a_split_tree_of_the_running_kernel_is_merged_with_its_source(root: Path) -> None:
    modules = root / "lib/modules" / RELEASE
    lay(modules / "build", *BUILT)
    lay(modules / "source", *COMMON)
    found = find_headers(root / "cache", root=root, release=RELEASE)
    assert found.path.parent == root / "cache"
    assert all((found.path / name).read_text() == name for name in (*COMMON, *BUILT))


def test_a_build_link_into_debians_split_tree_finds_its_common_part(root: Path) -> None:
    build = root / "lib/modules" / RELEASE / "build"
    build.parent.mkdir(parents=True)
    build.symlink_to(debian(root, "6.1.0-9"))
    found = find_headers(root / "cache", root=root, release=RELEASE)
    assert all((found.path / name).exists() for name in (*COMMON, *BUILT))
    assert found.origin.startswith("the running kernel's")


def test_the_kernels_own_archive_comes_before_foreign_packages(root: Path) -> None:
    debian(root, "6.9.0-1")
    tree = lay(root / "tree", *COMMON, *BUILT)
    (root / "sys/kernel").mkdir(parents=True)
    with tarfile.open(root / "sys/kernel/kheaders.tar.xz", "w:xz") as tar:
        tar.add(tree, arcname=".")
    found = find_headers(root / "cache", root=root, release=RELEASE)
    assert "kheaders" in found.origin
    assert (found.path / "include/uapi/linux/bpf.h").is_file()
    assert find_headers(root / "cache", root=root, release=RELEASE) == found


def test_an_archive_without_what_is_needed_is_refused(root: Path) -> None:
    tree = lay(root / "tree", COMMON[0])
    (root / "sys/kernel").mkdir(parents=True)
    with tarfile.open(root / "sys/kernel/kheaders.tar.xz", "w:xz") as tar:
        tar.add(tree, arcname=".")
    with pytest.raises(HeadersError, match=r"kheaders\.tar\.xz lacks"):
        find_headers(root / "cache", root=root, release=RELEASE)


def test_of_several_packages_the_newest_complete_one_is_taken(root: Path) -> None:
    debian(root, "6.1.0-9")
    debian(root, "6.1.0-56")
    lay(root / f"usr/src/linux-headers-6.12.0-1-{DEBIAN}", *BUILT)  # its -common is missing
    found = locate_headers(root=root, release=RELEASE)
    assert [layer.name for layer in found.layers] == [
        f"linux-headers-6.1.0-56-{DEBIAN}",
        "linux-headers-6.1.0-56-common",
    ]
    assert "not the running kernel's" in found.origin


def test_where_both_trees_have_a_file_the_architectures_wins(root: Path) -> None:
    build = debian(root, "6.1.0-9")
    lay(build, "Makefile", text="arch")
    lay(root / "usr/src/linux-headers-6.1.0-9-common", "Makefile", text="common")
    found = find_headers(root / "cache", root=root, release=RELEASE)
    assert (found.path / "Makefile").read_text() == "arch"


def test_a_package_upgraded_in_place_is_another_tree(root: Path) -> None:
    build = debian(root, "6.1.0-9")
    before = find_headers(root / "cache", root=root, release=RELEASE)
    lay(build, BUILT[0], text="another configuration")
    assert find_headers(root / "cache", root=root, release=RELEASE).identity != before.identity


def test_agents_that_merge_at_once_get_one_whole_tree(root: Path) -> None:
    debian(root, "6.1.0-9")
    with ThreadPoolExecutor(8) as pool:
        found = set(
            pool.map(lambda _: find_headers(root / "cache", root=root, release=RELEASE), range(8))
        )
    assert len(found) == 1
    assert [path.name for path in (root / "cache").iterdir()] == [found.pop().path.name]


def test_with_no_headers_the_package_to_install_is_named(root: Path) -> None:
    with pytest.raises(HeadersError, match=RELEASE) as caught:
        find_headers(root / "cache", root=root, release=RELEASE)
    assert caught.value.hint == f"apt-get install linux-headers-{DEBIAN}"
