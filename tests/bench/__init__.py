"""The measurements behind the table of `make bench`: what Tangram costs, against what it may cost.

Each part is a module that runs alone (`python -m tests.bench.verbs --json FILE`), in a process of its own; `__main__`
runs them and prints one table. A part's JSON is an object of which the table reads `targets` only: a list of

    {"key", "what", "target", "measured", "unit", "at_least", "ratio", "note"}

`at_least` says that more is better; `ratio` that the figure means the same on every machine, so that `check` may
compare it with the committed one; `note` is in words. Nothing here is a test: `make test` asserts no timing.
"""
