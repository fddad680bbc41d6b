"""The law, counted plainly: what is promised beyond what a device has, and who stands beside whom. For tests only."""

from collections.abc import Sequence
from itertools import combinations

from solver import Node
from solver.cluster import Allocation, devices_of


def beyond_the_law(node: Node, taken: Sequence[Allocation]) -> list[str]:
    """Devices that overlap: a GPU is 1000 milli, in MIG mode so many units, and never both."""
    sizes = {(g.uuid, p.name): p.size for g in node.gpus if g.geometry for p in g.geometry.profiles}
    wrong = []
    used: dict[str, set[int]] = {}
    shared: dict[str, int] = {}
    for device in devices_of(taken):
        if device.milli:
            shared[device.gpu] = shared.get(device.gpu, 0) + device.milli
            continue
        units = set(range(16))
        if device.slice is not None:
            units = {device.slice.start + unit for unit in range(sizes[device.gpu, device.slice.profile])}
        if units & used.setdefault(device.gpu, set()):
            wrong.append(f"{device} overlaps")
        used[device.gpu] |= units
    wrong += [f"{milli} milli of {gpu} are promised" for gpu, milli in shared.items() if milli > 1000]
    return wrong + [f"{gpu} is shared and given away" for gpu in shared if gpu in used]


def beside_the_wrong(taken: Sequence[Allocation]) -> list[str]:
    """Pods of different tenants on one GPU, or one node, of whom one wants to be apart."""
    wrong = []
    for one, other in combinations([each for each in taken if each.devices], 2):
        wishes = {one.guest.isolation, other.guest.isolation}
        on_one_gpu = {device.gpu for device in one.devices} & {device.gpu for device in other.devices}
        if one.guest.tenant == other.guest.tenant != "":
            continue
        if "node" in wishes or ("gpu" in wishes and on_one_gpu):
            wrong.append(f"{one.guest} is beside {other.guest}")
    return wrong
