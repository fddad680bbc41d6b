"""The agent of one GPU node: reads NVML behind a deadline (`nvml`, `child`) and reports what changes (`agent`)."""
