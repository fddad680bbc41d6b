"""The agent of one GPU node (docs/agent.md).

nvml ◀── child ◀── agent ──▶ service        NVML behind a deadline; reports what changes (`agent`, `service`),
                     │  ▲                   waits for orders (`feed`) and carries them out, says what signs
                  health  feed              mean over time (`health`) and remembers it (`memory`)
"""
