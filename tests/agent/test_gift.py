"""What containers are given, on small hosts made of plain files."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from app.agent.cdi import CdiFile
from app.agent.gift import CannotHand, Giver, Mount, Mps
from app.agent.giving import Giving, add_arguments, giving_of
from app.report import DeviceAt
from tests.agent.driver_host import DriverHost, gpu, instance, report

SLICE = instance("1g.10gb+me", 3, 9, "MIG-1")


@pytest.fixture
def there(tmp_path: Path) -> DriverHost:
    """A host without anything."""
    return DriverHost(tmp_path / "host")


@pytest.fixture
def cdi(there: DriverHost, tmp_path: Path) -> CdiFile:
    """The CDI file of that host."""
    return CdiFile(tmp_path / "cdi", host=there.host)


def whole(index: int = 0) -> DeviceAt:
    """A whole GPU as promised."""
    return DeviceAt(gpu=f"GPU-{index}")


def share(milli: int, index: int = 0) -> DeviceAt:
    """A share as promised."""
    return DeviceAt(gpu=f"GPU-{index}", milli=milli)


def part(profile: str = "1g.10gb+me", start: int = 3) -> DeviceAt:
    """A slice of GPU-0 as promised."""
    return DeviceAt(gpu="GPU-0", profile=profile, start=start)


# ---- by environment ----


def test_gpus_are_named_to_nvidias_runtime(there):
    gift = Giver(host=there.host).gift([whole(1), whole(0)], report(gpu(0), gpu(1)))

    assert gift.envs == {"NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-0"}
    assert (gift.cdi_names, gift.mounts, gift.device_nodes, gift.annotations) == ((), (), (), {})


def test_what_the_driver_does_for_a_container_is_left_to_its_image(there):
    """NVIDIA_DRIVER_CAPABILITIES says what software the image has; NVIDIA's plugin does not set it either."""
    assert "NVIDIA_DRIVER_CAPABILITIES" not in Giver(host=there.host).gift([whole()], report(gpu())).envs


def test_device_files_that_can_be_seen_are_given_so_that_an_update_of_limits_does_not_take_them_away(there):
    there.devices(0, 5)
    gift = Giver(host=there.host).gift([whole()], report(gpu(0, minor=5)))

    paths = [node.path for node in gift.device_nodes]
    assert paths == [
        "/dev/nvidia5",
        "/dev/nvidiactl",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
        "/dev/nvidia-modeset",
    ]
    assert all((node.host_path, node.permissions) == (node.path, "rw") for node in gift.device_nodes)


def test_a_slice_is_its_uuid_and_its_capabilities(there):
    there.devices(0)
    there.slice(0, 9, (84, 85))
    gift = Giver(host=there.host).gift([part()], report(gpu(0, SLICE)))

    assert gift.envs == {"NVIDIA_VISIBLE_DEVICES": "MIG-1"}
    assert [node.path for node in gift.device_nodes[:3]] == [
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap84",
        "/dev/nvidia-caps/nvidia-cap85",
    ]


def test_an_agent_that_does_not_see_a_slices_files_leaves_them_to_nvidias_runtime(there):
    """Started by that runtime, it sees the capabilities of its own start, and none that came later."""
    there.devices(0)
    there.slice(0, 1, (12, 13))
    gift = Giver(host=there.host).gift([part()], report(gpu(0, SLICE)))

    assert gift.envs == {"NVIDIA_VISIBLE_DEVICES": "MIG-1"}
    assert gift.device_nodes == ()


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (whole(7), "not among this node's GPUs"),
        (whole(0), "in MIG mode"),
        (part("1g.10gb", 3), "not there"),
        (part("1g.10gb+me", 2), "not there"),
        (part("2g.20gb", 4), "no UUID yet"),
    ],
)
def test_what_is_not_there_is_refused_in_words(there, device, words):
    half_made = instance("2g.20gb", 4, 3, None)
    with pytest.raises(CannotHand, match=words):
        Giver(host=there.host).gift([device], report(gpu(0, SLICE, half_made)))


# ---- by CDI ----


def test_a_gpu_is_named_by_its_uuid_in_the_cdi_file(there, cdi):
    there.devices(0)
    gift = Giver(host=there.host, cdi=cdi).gift([whole()], report(gpu()))

    assert gift.cdi_names == ("tangram.gpu/gpu=GPU-0",)
    assert (gift.envs, gift.device_nodes) == ({}, ())


def test_a_slice_is_named_by_its_place_so_that_the_name_outlives_a_reboot(there, cdi):
    """The kubelet keeps a container's names in its checkpoint; UUIDs are new after a reboot, places are not."""
    there.devices(0)
    there.slice(0, 9, (84, 85))
    there.slice(0, 1, (12, 13))
    giver = Giver(host=there.host, cdi=cdi)
    before = giver.gift([part()], report(gpu(0, SLICE)))
    after = giver.gift([part()], report(gpu(0, instance("1g.10gb+me", 3, 1, "MIG-new"))))

    assert before.cdi_names == after.cdi_names == ("tangram.gpu/gpu=GPU-0:1g.10gb.me:3",)


def test_what_is_handed_out_by_name_is_in_the_file_already(there, cdi, tmp_path):
    """The runtime looks it up right after the answer, and the agent's next look may be seconds away."""
    there.devices(0)
    Giver(host=there.host, cdi=cdi).gift([whole()], report(gpu()))

    assert '"GPU-0"' in (tmp_path / "cdi" / "tangram.json").read_text()


def test_by_cdi_a_slice_without_its_device_files_is_refused_in_words(there, cdi):
    there.devices(0)
    with pytest.raises(CannotHand, match=r"1g\.10gb\+me at 3 of GPU-0: the driver shows no MIG capability"):
        Giver(host=there.host, cdi=cdi).gift([part()], report(gpu(0, SLICE)))


# ---- shares ----


def test_a_time_sliced_share_is_the_gpu_and_nothing_holds_it_to_its_part(there):
    gift = Giver(host=there.host).gift([share(250)], report(gpu()))

    assert gift.envs == {"NVIDIA_VISIBLE_DEVICES": "GPU-0"}
    assert gift.mounts == ()


@pytest.mark.parametrize(
    ("milli", "memory_mib", "limit", "threads"),
    [
        (250, None, "0=20480M", "25"),
        (259, None, "0=21217M", "25"),
        (5, None, "0=409M", "1"),
        (125, 10240, "0=10240M", "12"),
        (1000, 81920, "0=81920M", "100"),
    ],
)
def test_a_share_under_mps_has_its_memory_and_threads(there, milli, memory_mib, limit, threads):
    """Memory as it was asked for, or that part of the GPU's; threads rounded down, but never to none."""
    giver = Giver(host=there.host, mps=Mps("/run/nvidia/mps/pipe", "/run/nvidia/mps/shm"))
    gift = giver.gift([share(milli)], report(gpu()), memory_mib=memory_mib)

    assert gift.envs == {
        "NVIDIA_VISIBLE_DEVICES": "GPU-0",
        "CUDA_MPS_PIPE_DIRECTORY": "/mps/pipe",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": limit,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": threads,
    }
    assert gift.mounts == (
        Mount("/mps/pipe", "/run/nvidia/mps/pipe", read_only=False),
        Mount("/dev/shm", "/run/nvidia/mps/shm", read_only=False),
    )


def test_whole_gpus_are_no_mps_clients(there):
    """A client is limited to what the daemon's default says; who has the whole GPU shall have all of it."""
    gift = Giver(host=there.host, mps=Mps("/run/nvidia/mps/pipe")).gift([whole()], report(gpu()))

    assert set(gift.envs) == {"NVIDIA_VISIBLE_DEVICES"}
    assert gift.mounts == ()


def test_a_share_of_two_gpus_is_none(there):
    with pytest.raises(CannotHand, match="a share is of one GPU"):
        Giver(host=there.host).gift([share(100, 0), share(100, 1)], report(gpu(0), gpu(1)))


def test_limits_of_a_share_are_given_by_cdi_too(there, cdi):
    there.devices(0)
    gift = Giver(host=there.host, cdi=cdi, mps=Mps("/p")).gift([share(500)], report(gpu()))

    assert gift.cdi_names == ("tangram.gpu/gpu=GPU-0",)
    assert gift.envs["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "50"


# ---- options ----


def parsed(*arguments: str) -> Giving:
    """As the agent's command line makes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hand-over", default="env")
    parser.add_argument("--cdi-dir", type=Path, default=Path("/var/run/cdi"))
    add_arguments(parser)
    return giving_of(parser.parse_args(arguments))


def test_without_options_it_is_by_environment_and_shares_are_time_sliced():
    giver, file = parsed().build()

    assert parsed() == Giving()
    assert file is None
    assert set(giver.gift([share(250)], report(gpu(0, minor=999))).envs) == {"NVIDIA_VISIBLE_DEVICES"}


def test_options_reach_the_file_and_the_gift(there, tmp_path):
    there.devices(0)
    options = parsed(
        *("--hand-over", "cdi", "--cdi-dir", str(tmp_path / "cdi"), "--cdi-kind", "example.com/gpu"),
        *("--host-root", str(there.root), "--mps-dir", "/p", "--mps-shm", "/s"),
    )
    giver, file = options.build(there.root / "proc")
    gift = giver.gift([share(250)], report(gpu()))

    assert gift.cdi_names == ("example.com/gpu=GPU-0",)
    assert [mount.host_path for mount in gift.mounts] == ["/p", "/s"]
    assert file is not None
    assert file.kind == "example.com/gpu"


@pytest.mark.parametrize("kind", ["gpu", "nvidia.com", "nvidia.com/", "/gpu", "a/b/c", "nvidia.com/gpu=0"])
def test_a_kind_that_no_runtime_would_take_is_refused(kind):
    with pytest.raises(ValueError, match="is no CDI kind"):
        parsed("--hand-over", "cdi", "--cdi-kind", kind).build()
