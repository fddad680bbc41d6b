"""Who stands beside whom: tenants, classes of work, and the wish to be apart. No GPUs, no prices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Guest(NamedTuple):
    """Who a pod is to its neighbours: tenant, class of work, and from whom it wants to be apart.

    `workload` is "training", "batch", "serving" or empty; `isolation` is "gpu" (no other tenant on its GPUs),
    "node" (nor on its node) or empty.
    """

    tenant: str = ""
    workload: str = ""
    isolation: str = ""


NOBODY = Guest()
"""A pod that says nothing of itself."""

Guests = tuple[Guest, ...]
"""Whose pods are on a GPU or a node: sorted, each different one once; empty where all are unnamed, or nobody is."""


def join(guests: Guests, guest: Guest, *, occupied: bool) -> Guests:
    """The guests after one more has come; `occupied`: whether anybody was there."""
    if not guests and guest == NOBODY:
        return ()
    there = set(guests) | {guest} | ({NOBODY} if occupied and not guests else set())
    return tuple(sorted(there))


def may_join(guests: Guests, guest: Guest, level: str, *, occupied: bool) -> bool:
    """Whether the guest's wish and the wishes of those who are there allow it: on one "gpu", or one "node"."""
    if not occupied:
        return True
    wishes = ("gpu", "node") if level == "gpu" else ("node",)
    for other in guests or (NOBODY,):
        same = other.tenant == guest.tenant != ""
        if not same and (guest.isolation in wishes or other.isolation in wishes):
            return False
    return True


def guests_of(all_there: Iterable[Guest]) -> Guests:
    """The guests where these pods are."""
    there = set(all_there)
    return () if there <= {NOBODY} else tuple(sorted(there))


def tenants_mixed(guests: Guests) -> int:
    """How many tenants are there beyond the first; pods without a tenant count as one."""
    return max(0, len({guest.tenant for guest in guests}) - 1)


def classes_mixed(guests: Guests) -> bool:
    """Whether serving stands beside training."""
    return {"serving", "training"} <= {guest.workload for guest in guests}
