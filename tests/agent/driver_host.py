"""A small host with a driver, made of plain files: what an agent looks at before it hands out devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from app.agent.device_files import COMMON, Host
from app.report import ComputeInstance, Gpu, Instance, Mig, NodeReport

DRIVER = "550.54.15"
FOLDER = "usr/lib/x86_64-linux-gnu"
LIBRARIES = ("libcuda.so", "libnvidia-ml.so", "libnvidia-ptxjitcompiler.so")


@dataclass(frozen=True)
class DriverHost:
    """Folders under one root; `host` is how the agent sees them."""

    root: Path

    @property
    def host(self) -> Host:
        """As an agent in a container sees it: the host's files in a folder."""
        return Host(root=self.root, proc=self.root / "proc")

    def file(self, path: str, text: str = "") -> Path:
        """Make a file, whatever it is meant to be."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def devices(self, *minors: int) -> None:
        """The device files of these GPUs and those that all need."""
        for path in (*COMMON, *(f"/dev/nvidia{minor}" for minor in minors)):
            self.file(path)

    def driver(self, version: str = DRIVER, folder: str = FOLDER) -> None:
        """Libraries with the links that an installer makes, one that is not the driver's, and nvidia-smi."""
        for library in LIBRARIES:
            real = self.file(f"{folder}/{library}.{version}", library)
            (real.parent / f"{library}.1").symlink_to(real.name)
        (self.root / folder / "libcuda.so").symlink_to("libcuda.so.1")
        self.file(f"{folder}/libother.so.1.2.3")
        self.file("usr/bin/nvidia-smi")

    def capability(self, gpu: int, gi_id: int, minor: int, *, ci_id: int | None = None, modify: int = 0) -> None:
        """A MIG capability as the driver describes it, with its device file unless that is to be made by others."""
        within = f"gi{gi_id}" if ci_id is None else f"gi{gi_id}/ci{ci_id}"
        said = f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\nDeviceFileModify: {modify}\n"
        self.file(f"proc/driver/nvidia/capabilities/gpu{gpu}/mig/{within}/access", said)
        if not modify:
            self.file(f"dev/nvidia-caps/nvidia-cap{minor}")

    def slice(self, gpu: int, gi_id: int, minors: tuple[int, int]) -> None:
        """Both capabilities of a slice with one compute instance."""
        self.capability(gpu, gi_id, minors[0])
        self.capability(gpu, gi_id, minors[1], ci_id=0)


def gpu(index: int = 0, *instances: Instance, mig: bool = False, minor: int | None = None) -> Gpu:
    """A GPU of 80 GiB; in MIG mode where `mig` or it has instances."""
    return Gpu(
        uuid=f"GPU-{index}",
        index=index,
        minor=index if minor is None else minor,
        product="NVIDIA H100 80GB HBM3",
        memory_mib=81920,
        mig=Mig(enabled=mig or bool(instances), instances=instances),
    )


def instance(profile: str, start: int, gi_id: int, uuid: str | None) -> Instance:
    """A slice with one compute instance, or none where it has no UUID."""
    compute = (ComputeInstance(id=0, uuid=uuid),) if uuid else ()
    return Instance(profile=profile, gi_id=gi_id, start=start, size=1, uuid=uuid, compute=compute)


def report(*gpus: Gpu, driver: str = DRIVER, error: str = "") -> NodeReport:
    """A report with these GPUs."""
    return NodeReport(node="n1", version=1, driver=driver, gpus=gpus, error=error)
