"""Sample nodes and the grammar that names them."""

import re
import uuid

import pytest

from solver.samples import KINDS, parse_samples, sample_node

DGX_1V = """
X NV1 NV1 NV2 NV2 SYS SYS SYS
NV1 X NV2 NV1 SYS NV2 SYS SYS
NV1 NV2 X NV2 SYS SYS NV1 SYS
NV2 NV1 NV2 X SYS SYS SYS NV1
NV2 SYS SYS SYS X NV1 NV1 NV2
SYS NV2 SYS SYS NV1 X NV2 NV1
SYS SYS NV1 SYS NV1 NV2 X NV2
SYS SYS SYS NV1 NV2 NV1 NV2 X
"""


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_is_a_sound_node(kind: str) -> None:
    """Symmetric links, zero on the diagonal, UUIDs in NVML's form that never change."""
    node = sample_node("n", kind)
    size = len(node.gpus)

    assert str(size) == kind.partition("x")[0]
    assert all(node.links[a][b] == node.links[b][a] for a in range(size) for b in range(size))
    assert all((node.links[a][b] == 0) == (a == b) for a in range(size) for b in range(size))
    assert all(re.fullmatch(r"GPU-[0-9a-f-]{36}", gpu.uuid) for gpu in node.gpus)
    assert all(uuid.UUID(gpu.uuid.removeprefix("GPU-")) for gpu in node.gpus)
    assert node == sample_node("n", kind)
    assert not {gpu.uuid for gpu in node.gpus} & {gpu.uuid for gpu in sample_node("m", kind).gpus}


def test_the_dgx_1v_is_wired_as_its_dumps_say() -> None:
    """Eight single links, eight double ones, twelve pairs without."""
    gbs = {"X": 0, "NV1": 50, "NV2": 100, "SYS": 20}
    rows = tuple(tuple(gbs[cell] for cell in line.split()) for line in DGX_1V.split("\n") if line)

    assert sample_node("n", "8xV100").links == rows


def test_mig_mode_is_part_of_the_kind() -> None:
    """All GPUs, or the last few."""
    assert all(gpu.geometry for gpu in sample_node("n", "8xA100-mig").gpus)
    assert [bool(gpu.geometry) for gpu in sample_node("n", "4xA30-mig1").gpus] == [False, False, False, True]
    assert not any(gpu.geometry for gpu in sample_node("n", "8xH100-one-out").gpus)


def test_a_list_of_kinds_makes_nodes_with_names_of_their_own() -> None:
    """Names are lower case, as Kubernetes wants them."""
    names = [node.name for node in parse_samples("8xH100:2, 8xA100-mig,8xH100:1")]

    assert names == ["8xh100-0", "8xh100-1", "8xa100-mig-0", "8xh100-2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not kind:count"),
        ("8xH100:", "is not kind:count"),
        ("8xH100:0", "is not kind:count"),
        ("8xH100:-1", "is not kind:count"),
        ("8xH100:two", "is not kind:count"),
        ("9xH100:1", "no sample node is called '9xH100'; there are 8xH100, "),
        ("8xL40S-mig:1", "NVIDIA L40S has no MIG"),
        ("4xA30-mig5:1", "the node has 4 GPUs only"),
    ],
)
def test_a_bad_list_is_refused_in_words(text: str, words: str) -> None:
    """The message says what was found and what could have been."""
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_samples(text)
