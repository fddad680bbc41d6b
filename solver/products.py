"""What each GPU model is: memory, and how it can be cut. For simulation and samples only.

A node with an agent never uses this table: names, ids and placements vary by driver, VBIOS and board
revision, so they are read from the board itself.

Source: mig-profiles.json of the project's shared data (2026-11-20: NVIDIA's MIG User Guide v580 and v610,
nvidia-smi listings, go-nvml and mig-parted). Seen in listings: A30, A100, H100-80, H100 NVL, RTX PRO 6000.
The other boards of eight units share ids and shapes of that family, and their placements and engines are
inferred from it. Memory of a profile is what nvidia-smi printed where a listing was found, otherwise 95 % of
what the name says.
Boards without MIG, NVML names, compute capabilities and power limits (watts, the highest that the data sheet of
the form named gives) are from general knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass

from solver.geometry import Geometry, Kind, Profile


@dataclass(frozen=True, slots=True)
class Product:
    """One GPU model. `geometry` is None where it has no MIG (or where its placements are not known)."""

    key: str
    name: str
    architecture: str
    compute_capability: str
    memory_mib: int
    geometry: Geometry | None = None
    watts: int = 0

    @property
    def kind(self) -> Kind:
        """What a GPU of this model is."""
        capability = tuple(map(int, self.compute_capability.split(".")))
        return Kind(self.name, self.architecture, capability, self.memory_mib, self.watts)


def _engines(decoder: int = 0, encoder: int = 0, jpeg: int = 0, ofa: int = 0) -> tuple[tuple[str, int], ...]:
    counts = (("decoder", decoder), ("encoder", encoder), ("jpeg", jpeg), ("ofa", ofa))
    return tuple((name, count) for name, count in counts if count)


_ONES = (0, 1, 2, 3, 4, 5, 6)
_TWOS = (0, 2, 4)

# kind: id, units, starts, compute slices, engines on Ampere, engines on Hopper and later
_EIGHT_UNITS = {
    "1g": (19, 1, _ONES, 1, _engines(), _engines(decoder=1, jpeg=1)),
    "1g+me": (20, 1, _ONES, 1, _engines(decoder=1, jpeg=1, ofa=1), _engines(decoder=1, jpeg=1, ofa=1)),
    "1g×2": (15, 2, (0, 2, 4, 6), 1, _engines(decoder=1), _engines(decoder=1, jpeg=1)),
    "2g": (14, 2, _TWOS, 2, _engines(decoder=1), _engines(decoder=2, jpeg=2)),
    "3g": (9, 4, (0, 4), 3, _engines(decoder=2), _engines(decoder=3, jpeg=3)),
    "4g": (5, 4, (0,), 4, _engines(decoder=2), _engines(decoder=4, jpeg=4)),
    "7g": (0, 8, (0,), 7, _engines(decoder=5, jpeg=1, ofa=1), _engines(decoder=7, jpeg=7, ofa=1)),
}


def _eight_units(gb: str, mib: tuple[int, ...] = (), *, ampere: bool = False) -> Geometry:
    """The family A100 to GB300. `gb`: what names say for one, two, four and eight units; `mib`: as listed."""
    one, two, four, eight = gb.split()
    memory = mib or tuple(int(float(said) * 1024 * 0.95) for said in (one, two, four, eight))
    by_units = {units: (said, size) for units, said, size in zip((1, 2, 4, 8), gb.split(), memory, strict=True)}
    profiles = []
    for kind, (number, units, starts, compute, on_ampere, later) in _EIGHT_UNITS.items():
        said, size = by_units[units]
        name = f"{kind[:2]}.{said}gb{kind[2:] if kind.endswith('+me') else ''}"
        profiles.append(Profile(name, number, units, starts, compute, size, on_ampere if ampere else later))
    totals = _engines(decoder=5, jpeg=1, ofa=1) if ampere else _engines(decoder=7, jpeg=7, ofa=1)
    return Geometry(8, 7, tuple(profiles), totals)


_A30 = Geometry(
    4,
    4,
    (
        Profile("1g.6gb", 14, 1, (0, 1, 2, 3), 1, 5836),
        Profile("1g.6gb+me", 21, 1, (0, 1, 2, 3), 1, 5836, _engines(decoder=1, jpeg=1, ofa=1)),
        Profile("2g.12gb", 5, 2, (0, 2), 2, 11672, _engines(decoder=2)),
        Profile("2g.12gb+me", 6, 2, (0, 2), 2, 11672, _engines(decoder=2, jpeg=1, ofa=1)),
        Profile("4g.24gb", 0, 4, (0,), 4, 23344, _engines(decoder=4, jpeg=1, ofa=1)),
    ),
    _engines(decoder=4, jpeg=1, ofa=1),
)

_QUARTERS, _HALVES = (0, 3, 6, 9), (0, 6)
_RTX_PRO_6000 = Geometry(
    12,
    4,
    (
        Profile("1g.24gb", 14, 3, _QUARTERS, 1, 24187, _engines(1, 1, 1)),
        Profile("1g.24gb+me", 21, 3, _QUARTERS, 1, 24187, _engines(1, 1, 1, 1)),
        Profile("1g.24gb+gfx", 47, 3, _QUARTERS, 1, 24187, _engines(1, 1, 1)),
        Profile("1g.24gb+me.all", 65, 3, _QUARTERS, 1, 24187, _engines(4, 4, 4, 1)),
        Profile("1g.24gb-me", 67, 3, _QUARTERS, 1, 24187),
        Profile("2g.48gb", 5, 6, _HALVES, 2, 48517, _engines(2, 2, 2)),
        Profile("2g.48gb+gfx", 35, 6, _HALVES, 2, 48517, _engines(2, 2, 2)),
        Profile("2g.48gb+me.all", 64, 6, _HALVES, 2, 48517, _engines(4, 4, 4, 1)),
        Profile("2g.48gb-me", 66, 6, _HALVES, 2, 48517),
        Profile("4g.96gb", 0, 12, (0,), 4, 97280, _engines(4, 4, 4, 1)),
        Profile("4g.96gb+gfx", 32, 12, (0,), 4, 97280, _engines(4, 4, 4, 1)),
    ),
    _engines(4, 4, 4, 1),
)

_A100_40 = _eight_units("5 10 20 40", (4864, 9856, 19968, 40192), ampere=True)
_A100_80 = _eight_units("10 20 40 80", (9856, 19968, 40192, 80384), ampere=True)
_H100_80 = _eight_units("10 20 40 80", (9984, 20091, 40448, 81152))
_H100_94 = _eight_units("12 24 47 94", (10875, 22016, 47227, 94843))
_H200 = _eight_units("18 35 71 141", (16384, 33024, 71168, 143104))

PRODUCTS = (
    Product("A30-24", "NVIDIA A30", "ampere", "8.0", 24576, _A30, watts=165),
    Product("A100-40", "NVIDIA A100-SXM4-40GB", "ampere", "8.0", 40960, _A100_40, watts=400),
    Product("A100-80", "NVIDIA A100-SXM4-80GB", "ampere", "8.0", 81920, _A100_80, watts=400),
    Product("A100-80-PCIE", "NVIDIA A100 80GB PCIe", "ampere", "8.0", 81920, _A100_80, watts=300),
    Product("H100-80", "NVIDIA H100 80GB HBM3", "hopper", "9.0", 81559, _H100_80, watts=700),
    Product("H100-94", "NVIDIA H100 NVL", "hopper", "9.0", 95830, _H100_94, watts=400),
    Product(
        "GH200-96",
        "NVIDIA GH200 480GB",
        "hopper",
        "9.0",
        97871,
        _eight_units("12 24 48 96", (11264, 23552, 47616, 95232)),
        watts=700,
    ),
    Product(
        "GH200-144",
        "NVIDIA GH200 144G HBM3e",
        "hopper",
        "9.0",
        147456,
        _eight_units("18 36 72 144", (17920, 36096, 70041, 140083)),
        watts=700,
    ),
    Product("H200-141", "NVIDIA H200", "hopper", "9.0", 143771, _H200, watts=700),
    Product("H200-141-NVL", "NVIDIA H200 NVL", "hopper", "9.0", 143771, _H200, watts=600),
    Product("H20-96", "NVIDIA H20", "hopper", "9.0", 97871, _eight_units("12 24 48 96"), watts=400),
    Product("H20-141", "NVIDIA H20-3e", "hopper", "9.0", 143771, _eight_units("18 35 71 141"), watts=400),
    Product(
        "B200-180",
        "NVIDIA B200",
        "blackwell",
        "10.0",
        183359,
        _eight_units("23 45 90 180", (22528, 45312, 87552, 175104)),
        watts=1000,
    ),
    Product(
        "GB200-186",
        "NVIDIA GB200",
        "blackwell",
        "10.0",
        189471,
        _eight_units("23 47 93 186", (22528, 46592, 90470, 180940)),
        watts=1200,
    ),
    Product("GB200-189", "NVIDIA GB200", "blackwell", "10.0", 193536, _eight_units("24 47 95 189"), watts=1200),
    Product("B300-269", "NVIDIA B300", "blackwell", "10.3", 275456, _eight_units("34 67 135 269"), watts=1100),
    Product("GB300-278", "NVIDIA GB300", "blackwell", "10.3", 284672, _eight_units("35 70 139 278"), watts=1400),
    Product(
        "RTXPRO6000-96",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "blackwell",
        "12.0",
        97887,
        _RTX_PRO_6000,
        watts=600,
    ),
    Product(
        "RTXPRO5000-48", "NVIDIA RTX PRO 5000 Blackwell", "blackwell", "12.0", 49152, watts=300
    ),  # placements unknown
    Product("V100-32", "Tesla V100-SXM2-32GB", "volta", "7.0", 32768, watts=300),
    Product("T4-16", "Tesla T4", "turing", "7.5", 15360, watts=70),
    Product("A10-24", "NVIDIA A10", "ampere", "8.6", 23028, watts=150),
    Product("A40-48", "NVIDIA A40", "ampere", "8.6", 46068, watts=300),
    Product("L4-24", "NVIDIA L4", "ada", "8.9", 23034, watts=72),
    Product("L40S-48", "NVIDIA L40S", "ada", "8.9", 46068, watts=350),
)


def product(key: str) -> Product:
    """The product with this key."""
    for found in PRODUCTS:
        if found.key == key:
            return found
    raise ValueError(f"no product {key}; there are {', '.join(found.key for found in PRODUCTS)}")
