"""Published and home-made workloads played against the solver's own decisions, beside other policies.

No service and no Kubernetes: arrivals and departures on a fleet in memory. Each module is one protocol and its
policies; what they print is in the same module.
"""
