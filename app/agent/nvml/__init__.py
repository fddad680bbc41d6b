"""Everything that talks to NVML. The only package that imports pynvml.

    Nvml().read() ──▶ Reading               Nvml().change(orders) ──▶ what failed, in words

    session   one session: a look at everything, and orders carried out
    device    a GPU while it is being read: asking it, in words, and what is kept over looks
    gpu       who it is, its memory, modes and processes        nics     the network card nearest to it
    mig       profiles, instances, what an operator must do     change   instances made and removed, modes switched
    links     NVLinks, PCIe paths, peer-to-peer                 fabric   the NVLink fabric beyond the node
    signals   signs of bad health, of this moment               events   XIDs as they come

A failure that concerns one GPU is caught at that GPU and said in words; the others are read. A symbol that the
library lacks means an old driver: the fact stays unknown and the reading goes on. Calls may block for ever in a
wedged driver and Python cannot interrupt them, so this runs in a process of its own (`child`). Struct
versions and rules follow nvml.h 13.3; what NVML calls MB is MiB.
"""

from app.agent.nvml.session import Nvml

__all__ = ["Nvml"]
