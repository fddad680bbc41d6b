"""The agent's side of the kubelet's APIs: which device ids are offered, the device plugins that it calls, what it
says of pods.

report ─▶ ids ─▶ plugin ◀──── kubelet      ListAndWatch: the ids; GetPreferredAllocation, Allocate: answered by `Hands`
                 pod_resources ─▶ kubelet  which pods it lists, and what their containers have

Only `plugin` and `pod_resources` import gRPC (12 MiB): an agent that hands out nothing imports neither.
"""
