"""The shell around the solver: HTTP, Kubernetes, NVML and time. Decisions live in `solver` and in the ledger."""
